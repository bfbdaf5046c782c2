"""The 4-bit formats with a non-linear codebook.

Sources: `block_iq4_*`, `kvalues_iq4nl` in ggml-common.h, `dequantize_row_iq4_*` in ggml-quants.c,
gguf-py 0.19.
"""
import torch

from ._nibble_codebook import NibbleCodebook
from .base import Fit, Grid, Terms
from .bits import half, half_bytes, join_planes, split_bits

KVALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class IQ4_NL(NibbleCodebook, ggml_type=20):
    """value = d * values[code]

    | offset | size | meaning                                                             |
    |--------|------|---------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                          |
    | 2      | 16   | qs, codes, values 0..15 in the low nibbles, 16..31 in the high ones |
    """

    block_length, block_bytes = 32, 18
    values = KVALUES
    grid = Grid(32, 32, KVALUES)

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(self.code_values(blocks[:, 2:]), half(blocks, 0))

    def encode(self, fit: Fit) -> torch.Tensor:
        return torch.cat([half_bytes(fit.d), join_planes(fit.codes, 4, 16)], 1)


class IQ4_XS(NibbleCodebook, ggml_type=23):
    """value = (d * (scale - 32)) * values[code], one scale per 32 values

    | offset | size | meaning                                                              |
    |--------|------|----------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                           |
    | 2      | 2    | high two bits of the eight scales, lowest first                      |
    | 4      | 4    | low four bits of the eight scales, two a byte, low nibble first      |
    | 8      | 128  | qs, codes; the low nibbles of 16 bytes hold 16 values, then the high |
    """

    block_length, block_bytes = 256, 136
    values = KVALUES
    grid = Grid(256, 32, KVALUES, scales=(-32, 31))

    def terms(self, blocks: torch.Tensor) -> Terms:
        high = split_bits(blocks[:, 2:4], 2, 4).view(-1, 8)
        low = split_bits(blocks[:, 4:8], 4, 2).view(-1, 8)
        scales = low.add_(high, alpha=16).sub_(32) * half(blocks, 0)
        return Terms(self.code_values(blocks[:, 8:].view(-1, 8, 16)), scales.unsqueeze(-1))

    def encode(self, fit: Fit) -> torch.Tensor:
        scales = (fit.scales + 32).to(torch.uint8)
        scale_bytes = [join_planes(scales // 16, 2, 1), join_planes(scales & 15, 4, 1)]
        return torch.cat([half_bytes(fit.d), *scale_bytes, join_planes(fit.codes, 4, 16)], 1)
