"""ggml's first formats: 32 values under one float16 scale, with or without an offset.

Sources: `block_q*` in ggml-common.h, `dequantize_row_q*` in ggml-quants.c, gguf-py 0.19 `quants.py`.
The low nibbles of `qs` hold values 0..15, the high nibbles values 16..31.
"""
import torch

from ..format import Format, bit_planes, bit_table, half, lookup


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
        return codes.view(torch.int8).sub_(8).float().mul_(half(blocks, 0))


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


class FiveBitCodes(Format):
    """Base of the formats that keep the fifth bits of the codes apart."""

    @staticmethod
    def fifth_bits() -> torch.Tensor:
        return bit_table(0, 16)

    @classmethod
    def codes(cls, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Codes, int8 (n, 32), from the fifth bits `qh`, uint8 (n, 4), and the nibbles `qs`, uint8 (n, 16)."""
        codes = bit_planes(low, 4).view(torch.int8).view(-1, 32)
        return codes.bitwise_or_(lookup(cls.constant("fifth_bits", low.device), high).view(-1, 32))


class Q5_0(FiveBitCodes, ggml_type=6):
    """value = d * (code - 16)

    | offset | size | meaning                                            |
    |--------|------|----------------------------------------------------|
    | 0      | 2    | d, float16                                         |
    | 2      | 4    | qh, fifth bit of value i at bit i, little endian   |
    | 6      | 16   | qs, low four bits of the codes, two a byte         |
    """

    block_length, block_bytes = 32, 22

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        return cls.codes(blocks[:, 2:6], blocks[:, 6:]).sub_(16).float().mul_(half(blocks, 0))


class Q5_1(FiveBitCodes, ggml_type=7):
    """value = d * code + m

    | offset | size | meaning                                            |
    |--------|------|----------------------------------------------------|
    | 0      | 2    | d, float16                                         |
    | 2      | 2    | m, float16                                         |
    | 4      | 4    | qh, fifth bit of value i at bit i, little endian   |
    | 8      | 16   | qs, low four bits of the codes, two a byte         |
    """

    block_length, block_bytes = 32, 24

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        return cls.codes(blocks[:, 4:8], blocks[:, 8:]).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


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
