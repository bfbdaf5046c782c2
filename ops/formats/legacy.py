"""ggml's first formats: 32 values under one float16 scale, with or without an offset.

Sources: `block_q*` in ggml-common.h, `dequantize_row_q*` in ggml-quants.c, gguf-py 0.19 `quants.py`.
The low nibbles of `qs` hold values 0..15, the high nibbles values 16..31.
"""
import torch

from ..format import Format, bit_planes, half, lookup


class Q4_0(Format, ggml_type=2):
    """value = d * (code - 8)

    | offset | size | meaning                |
    |--------|------|------------------------|
    | 0      | 2    | d, float16             |
    | 2      | 16   | qs, codes, two a byte  |
    """

    block_length, block_bytes = 32, 18

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        codes = bit_planes(blocks[:, 2:], 4).view(-1, 32)
        return codes.float().sub_(8).mul_(half(blocks, 0))


class Q4_1(Format, ggml_type=3):
    """value = d * code + m

    | offset | size | meaning                |
    |--------|------|------------------------|
    | 0      | 2    | d, float16             |
    | 2      | 2    | m, float16             |
    | 4      | 16   | qs, codes, two a byte  |
    """

    block_length, block_bytes = 32, 20

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        codes = bit_planes(blocks[:, 4:], 4).view(-1, 32)
        return codes.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _fifth_bits() -> torch.Tensor:
    """int64 (256,): for each byte of `qh`, 16 in every byte whose bit is set."""
    bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
    return (bits * 16).to(torch.int8).view(torch.int64).view(-1)


def _five_bit_codes(table: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Codes, uint8 (n, 32), from the fifth bits `qh`, uint8 (n, 4), and the nibbles `qs`, uint8 (n, 16)."""
    codes = bit_planes(low, 4).view(-1, 32)
    codes.view(torch.int32).bitwise_or_(lookup(table, high).view(-1, 32).view(torch.int32))
    return codes


class Q5_0(Format, ggml_type=6):
    """value = d * (code - 16)

    | offset | size | meaning                                            |
    |--------|------|----------------------------------------------------|
    | 0      | 2    | d, float16                                         |
    | 2      | 4    | qh, fifth bit of value i at bit i, little endian   |
    | 6      | 16   | qs, low four bits of the codes, two a byte         |
    """

    block_length, block_bytes = 32, 22
    fifth_bits = staticmethod(_fifth_bits)

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        codes = _five_bit_codes(cls.constant("fifth_bits", blocks.device), blocks[:, 2:6], blocks[:, 6:])
        return codes.float().sub_(16).mul_(half(blocks, 0))


class Q5_1(Format, ggml_type=7):
    """value = d * code + m

    | offset | size | meaning                                            |
    |--------|------|----------------------------------------------------|
    | 0      | 2    | d, float16                                         |
    | 2      | 2    | m, float16                                         |
    | 4      | 4    | qh, fifth bit of value i at bit i, little endian   |
    | 8      | 16   | qs, low four bits of the codes, two a byte         |
    """

    block_length, block_bytes = 32, 24
    fifth_bits = staticmethod(_fifth_bits)

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        codes = _five_bit_codes(cls.constant("fifth_bits", blocks.device), blocks[:, 4:8], blocks[:, 8:])
        return codes.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


class Q8_0(Format, ggml_type=8):
    """value = code * d

    | offset | size | meaning          |
    |--------|------|------------------|
    | 0      | 2    | d, float16       |
    | 2      | 32   | qs, codes, int8  |
    """

    block_length, block_bytes = 32, 34

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))
