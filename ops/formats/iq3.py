"""The formats of about 3.06 and 3.4 bits: points of a grid of four magnitudes, times signs.

Sources: `block_iq3_*`, `iq3*_grid`, `ksigns_iq2xs` in ggml-common.h, `dequantize_row_iq3_*` in
ggml-quants.c, gguf-py 0.19 `quants.py`.
"""
import torch

from ._grid_codebook import GridCodebook
from .base import Terms
from .bits import half, lookup, reinterpret, split_bits


class IQ3_XXS(GridCodebook, ggml_type=18):
    """value = (d * (0.5 + scale) * 0.5) * grid[index] * sign

    One 7-bit sign code per 8 values, one scale per 32.

    | offset | size | meaning                                                        |
    |--------|------|----------------------------------------------------------------|
    | 0      | 2    | d, float16                                                     |
    | 2      | 64   | qs, indices, one per 4 values                                  |
    | 66     | 32   | uint32 per 32 values: four sign codes, then the scale (4 bits) |
    """

    block_length, block_bytes = 256, 98

    def terms(self, blocks: torch.Tensor) -> Terms:
        words = reinterpret(blocks[:, 66:], torch.int32)
        scales = (words >> 28 & 15).float().add_(0.5).mul_(half(blocks, 0)).mul_(0.5)
        values = lookup(self.constant("points", blocks.device), blocks[:, 2:66]).view(-1, 8, 32)
        signs = lookup(self.constant("even_signs", blocks.device), split_bits(words, 7, 4))
        values.mul_(signs.view(-1, 8, 32))
        return Terms(values, scales.unsqueeze(-1))


class IQ3_S(GridCodebook, ggml_type=21):
    """value = (d * (1 + 2 * scale)) * grid[index] * sign, one scale per 32 values

    | offset | size | meaning                                             |
    |--------|------|-----------------------------------------------------|
    | 0      | 2    | d, float16                                          |
    | 2      | 64   | qs, low eight bits of the indices, one per 4 values |
    | 66     | 8    | qh, ninth bit of index i at bit i, little endian    |
    | 74     | 32   | signs, minus where the bit is set                   |
    | 106    | 4    | scales, 4 bits, low nibble first                    |
    """

    block_length, block_bytes = 256, 110

    def terms(self, blocks: torch.Tensor) -> Terms:
        high = split_bits(blocks[:, 66:74], 1, 8).view(-1, 64)
        index = torch.add(blocks[:, 2:66], high, alpha=256)
        scales = (1 + 2 * split_bits(blocks[:, 106:], 4, 2).view(-1, 8)) * half(blocks, 0)
        values = lookup(self.constant("points", blocks.device), index).view(-1, 8, 32)
        signs = lookup(self.constant("signs", blocks.device), blocks[:, 74:106])
        values.mul_(signs.view(-1, 8, 32))
        return Terms(values, scales.unsqueeze(-1))
