"""The formats near 1.6 and 1.8 bits: points of a ternary grid, shifted by an eighth.

Sources: `block_iq1_*`, `iq1s_grid` in ggml-common.h, `dequantize_row_iq1_*` in ggml-quants.c, gguf-py 0.19.
"""
import torch

from ..format import Format, half, reinterpret, split_bits
from ._grid_codebook import grid_values


def _shifted_grid() -> torch.Tensor:
    """float32 (4096, 8): the 2048 grid points plus 0.125, then the same points minus 0.125."""
    points = grid_values("IQ1_S").float()
    return torch.cat([points + 0.125, points - 0.125])


class IQ1_S(Format, ggml_type=19):
    """value = (d * (2 * scale + 1)) * (grid[index] ± 0.125), one index per 8 values, one scale and sign per 32

    | offset | size | meaning                                                                                    |
    |--------|------|--------------------------------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                                                 |
    | 2      | 32   | qs, low eight bits of the indices                                                          |
    | 34     | 16   | qh, uint16 per 32 values: high three bits of four indices, scale (3 bits), sign (top bit)  |
    """

    block_length, block_bytes = 256, 50
    shifted_grid = staticmethod(_shifted_grid)

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        high = reinterpret(blocks[:, 34:], torch.int16).int()
        scales = (2 * (high >> 12 & 7) + 1).float().mul_(half(blocks, 0))
        index = split_bits(high, 3, 4) << 8 | (high >> 4 & 0x800).unsqueeze(-1)
        index |= blocks[:, 2:34].view(-1, 8, 4)
        values = cls.constant("shifted_grid", blocks.device).index_select(0, index.view(-1))
        return values.view(-1, 8, 32).mul_(scales.unsqueeze(-1)).view(-1, 256)


class IQ1_M(Format, ggml_type=29):
    """value = (d * (2 * scale + 1)) * (grid[index] ± 0.125), one index and sign per 8 values, one scale per 16

    | offset | size | meaning                                                                                      |
    |--------|------|----------------------------------------------------------------------------------------------|
    | 0      | 32   | qs, low eight bits of the indices                                                            |
    | 32     | 16   | qh, a nibble per index, low nibble first: its high three bits, then the sign                 |
    | 48     | 8    | scales, uint16 per 64 values: four scales (3 bits), then four bits of d (float16), low first |
    """

    block_length, block_bytes = 256, 56
    shifted_grid = staticmethod(_shifted_grid)

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        packed = reinterpret(blocks[:, 48:], torch.int16).int()
        parts = (packed >> 12 & 15).unbind(-1)
        d = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
        d = d.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
        scales = (2 * split_bits(packed, 3, 4) + 1).view(-1, 16).float().mul_(d)
        index = split_bits(blocks[:, 32:48].int(), 4, 2).view(-1, 32) << 8 | blocks[:, :32]
        values = cls.constant("shifted_grid", blocks.device).index_select(0, index.view(-1))
        return values.view(-1, 16, 16).mul_(scales.unsqueeze(-1)).view(-1, 256)
