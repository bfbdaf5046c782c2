"""ggml's first formats: 32 values under one float16 scale, with or without an offset.

The low nibbles of `qs` hold values 0..15, the high nibbles values 16..31.

Sources: `block_q*` in ggml-common.h, `dequantize_row_q*` in ggml-quants.c, gguf-py 0.19
`quants.py`.
"""
import torch

from .base import Fit, Format, Grid, Terms, inverse, peaks, round_half_away
from .bits import bit_planes, bit_table, half, half_bytes, join_planes, lookup


def symmetric_fit(values: torch.Tensor, lowest: int) -> Fit:
    """Fits blocks as ggml's reference for formats without an offset.

    The value of largest magnitude gets the code of `lowest`, the lowest level.
    """
    d = peaks(values) / lowest
    codes = (values * inverse(d) + (0.5 - lowest)).clamp_(0, -2 * lowest - 1)
    return Fit(codes.to(torch.uint8), d, torch.ones_like(d))


def offset_fit(values: torch.Tensor, largest: int) -> Fit:
    """Fits blocks as ggml's reference for formats with an offset.

    The lowest value gets code 0, the highest one code `largest`.
    """
    lowest = values.amin(-1, keepdim=True)
    # by a tensor: CUDA replaces the division by a number with a product
    d = (values.amax(-1, keepdim=True) - lowest) / values.new_tensor(largest)
    codes = ((values - lowest) * inverse(d) + 0.5).clamp_(0, largest)
    return Fit(codes.to(torch.uint8), d, torch.ones_like(d), -lowest, torch.ones_like(d))


class Q4_0(Format, ggml_type=2):
    """value = d * (code - 8)

    | offset | size | meaning               |
    |--------|------|-----------------------|
    | 0      | 2    | d, float16            |
    | 2      | 16   | qs, codes, two a byte |
    """

    block_length, block_bytes = 32, 18
    grid = Grid(32, 32, tuple(range(-8, 8)))

    def terms(self, blocks: torch.Tensor) -> Terms:
        codes = bit_planes(blocks[:, 2:], 4).view(-1, 32)
        return Terms(codes.view(torch.int8).sub_(8), half(blocks, 0))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return self.encode(symmetric_fit(values, -8))

    def encode(self, fit: Fit) -> torch.Tensor:
        return torch.cat([half_bytes(fit.d), join_planes(fit.codes, 4, 16)], 1)


class Q4_1(Format, ggml_type=3):
    """value = d * code + m

    | offset | size | meaning               |
    |--------|------|-----------------------|
    | 0      | 2    | d, float16            |
    | 2      | 2    | m, float16            |
    | 4      | 16   | qs, codes, two a byte |
    """

    block_length, block_bytes = 32, 20
    grid = Grid(32, 32, tuple(range(16)), minimum=True)

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(bit_planes(blocks[:, 4:], 4).view(-1, 32), half(blocks, 0), -half(blocks, 2))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return self.encode(offset_fit(values, 15))

    def encode(self, fit: Fit) -> torch.Tensor:
        assert fit.dmin is not None
        scales = half_bytes(fit.d), half_bytes(-fit.dmin)
        return torch.cat([*scales, join_planes(fit.codes, 4, 16)], 1)


class FiveBitCodes(Format):
    """Base of the formats with 5-bit codes, whose fifth bits are stored separately."""

    zero: int  # the code of the value 0: 0 or 16

    def fifth_bits(self) -> torch.Tensor:
        """Returns what eight fifth bits add to the codes, as a table for `lookup`."""
        return bit_table(-self.zero, 16 - self.zero)

    def codes(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Returns the codes minus `zero`, int8 (n, 32).

        Args:
            high: The fifth bits, `qh`, uint8 (n, 4).
            low: The low four bits, `qs`, uint8 (n, 16).
        """
        codes = bit_planes(low, 4).view(torch.int8).view(-1, 32)
        fifth_bits = lookup(self.constant("fifth_bits", low.device), high)
        return codes.bitwise_or_(fifth_bits.view(-1, 32))

    @staticmethod
    def code_bytes(codes: torch.Tensor) -> torch.Tensor:
        """Returns `qh` and `qs`, uint8 (n, 20), of codes, uint8 (n, 32)."""
        high = join_planes((codes // 16).view(-1, 4, 8).transpose(1, 2).reshape(-1, 32), 1, 4)
        return torch.cat([high, join_planes(codes & 15, 4, 16)], 1)


class Q5_0(FiveBitCodes, ggml_type=6):
    """value = d * (code - 16)

    | offset | size | meaning                                          |
    |--------|------|--------------------------------------------------|
    | 0      | 2    | d, float16                                       |
    | 2      | 4    | qh, fifth bit of value i at bit i, little endian |
    | 6      | 16   | qs, low four bits of the codes, two a byte       |
    """

    block_length, block_bytes, zero = 32, 22, 16
    grid = Grid(32, 32, tuple(range(-16, 16)))

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(self.codes(blocks[:, 2:6], blocks[:, 6:]), half(blocks, 0))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return self.encode(symmetric_fit(values, -16))

    def encode(self, fit: Fit) -> torch.Tensor:
        return torch.cat([half_bytes(fit.d), self.code_bytes(fit.codes)], 1)


class Q5_1(FiveBitCodes, ggml_type=7):
    """value = d * code + m

    | offset | size | meaning                                          |
    |--------|------|--------------------------------------------------|
    | 0      | 2    | d, float16                                       |
    | 2      | 2    | m, float16                                       |
    | 4      | 4    | qh, fifth bit of value i at bit i, little endian |
    | 8      | 16   | qs, low four bits of the codes, two a byte       |
    """

    block_length, block_bytes, zero = 32, 24, 0
    grid = Grid(32, 32, tuple(range(32)), minimum=True)

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(self.codes(blocks[:, 4:8], blocks[:, 8:]), half(blocks, 0), -half(blocks, 2))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return self.encode(offset_fit(values, 31))

    def encode(self, fit: Fit) -> torch.Tensor:
        assert fit.dmin is not None
        return torch.cat([half_bytes(fit.d), half_bytes(-fit.dmin), self.code_bytes(fit.codes)], 1)


class Q8_0(Format, ggml_type=8):
    """value = code * d

    | offset | size | meaning         |
    |--------|------|-----------------|
    | 0      | 2    | d, float16      |
    | 2      | 32   | qs, codes, int8 |
    """

    block_length, block_bytes = 32, 34
    grid = Grid(32, 32, tuple(range(-127, 128)))

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(blocks[:, 2:].view(torch.int8), half(blocks, 0))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        d = values.abs().amax(-1, keepdim=True).div_(values.new_tensor(127))  # as in `offset_fit`
        return torch.cat([half_bytes(d), round_half_away(values * inverse(d)).view(torch.uint8)], 1)

    def encode(self, fit: Fit) -> torch.Tensor:
        return torch.cat([half_bytes(fit.d), fit.codes - 127], 1)
