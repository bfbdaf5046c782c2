"""The formats of about 1.6 and 1.8 bits: points of a ternary grid, shifted by an eighth.

Sources: `block_iq1_*`, `iq1s_grid` in ggml-common.h, `dequantize_row_iq1_*` in ggml-quants.c,
gguf-py 0.19.
"""
import torch

from ._grid_codebook import grid_values
from .base import Format, Terms
from .bits import half, lookup, reinterpret, shifts, split_bits


def _shifted_grid() -> torch.Tensor:
    """Returns the grid in eighths, shifted by +1 and then by -1: int64 (4096,), eight int8 each."""
    points = 8 * grid_values("IQ1_S")
    return torch.cat([points + 1, points - 1]).view(torch.int64).view(-1)


def _point_words() -> torch.Tensor:
    """Returns the grid for kernels, int32 (2048,): eight values + 1, a nibble each. The first four
    are in the low nibbles."""
    codes = (grid_values("IQ1_S") + 1).view(-1, 2, 4)
    return (codes[:, 0] + 16 * codes[:, 1]).contiguous().view(torch.int32).view(-1)


class IQ1_S(Format, ggml_type=19):
    """value = (d * (2 * scale + 1)) * (grid[index] ± 0.125)

    One index per 8 values, one scale and one sign per 32.

    | offset | size | meaning                                                    |
    |--------|------|------------------------------------------------------------|
    | 0      | 2    | d, float16                                                 |
    | 2      | 32   | qs, low eight bits of the indices                          |
    | 34     | 16   | qh, uint16 per 32 values: high three bits of four indices, |
    |        |      | scale (3 bits), sign (top bit)                             |
    """

    block_length, block_bytes = 256, 50
    shifted_grid = staticmethod(_shifted_grid)
    point_words = staticmethod(_point_words)

    def terms(self, blocks: torch.Tensor) -> Terms:
        high = reinterpret(blocks[:, 34:], torch.int16)
        scales = (2 * (high >> 12 & 7) + 1) * half(blocks, 0)
        index = torch.add(high.unsqueeze(-1) >> 4 & 0x800, split_bits(high, 3, 4), alpha=256)
        index += blocks[:, 2:34].view(-1, 8, 4)
        eighths = lookup(self.constant("shifted_grid", blocks.device), index)
        return Terms(eighths.view(-1, 8, 32), scales.mul_(0.125).unsqueeze(-1))


class IQ1_M(Format, ggml_type=29):
    """value = (d * (2 * scale + 1)) * (grid[index] ± 0.125)

    One index and one sign per 8 values, one scale per 16.

    | offset | size | meaning                                                                      |
    |--------|------|------------------------------------------------------------------------------|
    | 0      | 32   | qs, low eight bits of the indices                                            |
    | 32     | 16   | qh, a nibble per index, low nibble first: its high three bits, then the sign |
    | 48     | 8    | scales, uint16 per 64 values: four scales (3 bits), then four bits of d      |
    |        |      | (float16), low first                                                         |
    """

    block_length, block_bytes = 256, 56
    shifted_grid = staticmethod(_shifted_grid)
    point_words = staticmethod(_point_words)

    def terms(self, blocks: torch.Tensor) -> Terms:
        packed = reinterpret(blocks[:, 48:], torch.int16)
        parts = (packed >> 12 & 15) << shifts(4, 4, blocks.device)
        d = parts.sum(-1, keepdim=True, dtype=torch.int32)
        d = d.to(torch.int16).view(torch.float16).float()
        scales = (2 * split_bits(packed, 3, 4) + 1).view(-1, 16) * d
        high = split_bits(blocks[:, 32:48], 4, 2).view(-1, 32)
        index = torch.add(blocks[:, :32], high, alpha=256)
        eighths = lookup(self.constant("shifted_grid", blocks.device), index)
        return Terms(eighths.view(-1, 16, 16), scales.mul_(0.125).unsqueeze(-1))
