"""The formats between 2.06 and 2.5 bits: points of a grid of eight magnitudes, times signs.

In all of them value = (d * (0.5 + scale) * 0.25) * grid[index] * sign.

Sources: `block_iq2_*`, `iq2*_grid`, `ksigns_iq2xs` in ggml-common.h, `dequantize_row_iq2_*` in
ggml-quants.c, gguf-py 0.19 `quants.py`.
"""
import torch

from ._grid_codebook import GridCodebook
from .base import Terms
from .bits import half, lookup, reinterpret, split_bits


class IQ2_XXS(GridCodebook, ggml_type=16):
    """One index and one 7-bit sign code per 8 values, one scale per 32.

    | offset | size | meaning                                                               |
    |--------|------|-----------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                            |
    | 2      | 64   | qs, 8 bytes per 32 values: four indices, then uint32: four sign codes |
    |        |      | and the scale (4 bits)                                                |
    """

    block_length, block_bytes = 256, 66

    def terms(self, blocks: torch.Tensor) -> Terms:
        codes = blocks[:, 2:].view(-1, 8, 8)
        words = reinterpret(codes[..., 4:], torch.int32).squeeze(-1)
        scales = (words >> 28 & 15).float().add_(0.5).mul_(half(blocks, 0)).mul_(0.25)
        values = lookup(self.constant("points", blocks.device), codes[..., :4])
        values.mul_(lookup(self.constant("even_signs", blocks.device), split_bits(words, 7, 4)))
        return Terms(values.view(-1, 8, 32), scales.unsqueeze(-1))


class IQ2_XS(GridCodebook, ggml_type=17):
    """One index and one 7-bit sign code per 8 values, one scale per 16.

    | offset | size | meaning                                                          |
    |--------|------|------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                       |
    | 2      | 64   | qs, uint16 per 8 values: index (9 bits), then sign code (7 bits) |
    | 66     | 8    | scales, 4 bits, low nibble first                                 |
    """

    block_length, block_bytes = 256, 74

    def terms(self, blocks: torch.Tensor) -> Terms:
        codes = reinterpret(blocks[:, 2:66], torch.int16)
        scales = _scales(blocks[:, 66:], half(blocks, 0))
        values = lookup(self.constant("points", blocks.device), codes & 0x1FF)
        values.mul_(lookup(self.constant("even_signs", blocks.device), codes >> 9 & 0x7F))
        return Terms(values.view(-1, 16, 16), scales)


class IQ2_S(GridCodebook, ggml_type=22):
    """One index and one byte of signs per 8 values, one scale per 16.

    | offset | size | meaning                                                  |
    |--------|------|----------------------------------------------------------|
    | 0      | 2    | d, float16                                               |
    | 2      | 32   | qs, low eight bits of the indices                        |
    | 34     | 32   | signs, minus where the bit is set                        |
    | 66     | 8    | qh, high two bits of the indices, four a byte, low first |
    | 74     | 8    | scales, 4 bits, low nibble first                         |
    """

    block_length, block_bytes = 256, 82

    def terms(self, blocks: torch.Tensor) -> Terms:
        high = split_bits(blocks[:, 66:74], 2, 4).view(-1, 32)
        index = torch.add(blocks[:, 2:34], high, alpha=256)
        scales = _scales(blocks[:, 74:], half(blocks, 0))
        values = lookup(self.constant("points", blocks.device), index)
        values.mul_(lookup(self.constant("signs", blocks.device), blocks[:, 34:66]))
        return Terms(values.view(-1, 16, 16), scales)


def _scales(packed: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Returns d * (0.5 + scale) * 0.25, float32 (n, 16, 1).

    Args:
        packed: The scales, uint8 (n, 8), two a byte.
        d: float32 (n, 1).
    """
    return split_bits(packed, 4, 2).view(-1, 16).float().add_(0.5).mul_(d).mul_(0.25).unsqueeze(-1)
