"""Base of formats whose codes select four or eight values at once, a point of a grid.

The grids are gguf's own tables.
"""
import torch

from .base import Format
from .bits import bit_table


def grid_values(name: str) -> torch.Tensor:
    """Returns the grid of a format from `gguf.quants`, int8 (points, values per point)."""
    from gguf import quants  # here, so that importing the formats needs only torch

    reference = getattr(quants, name)
    packed = torch.frombuffer(bytearray.fromhex(reference.grid_hex.decode()),
                              dtype=torch.uint8).int()
    width = 2 if len(reference.grid_map) <= 4 else 4
    codes = torch.stack([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)], -1)
    return torch.tensor(reference.grid_map, dtype=torch.int8)[codes].view(reference.grid_shape)


class GridCodebook(Format):
    """Base of formats that multiply grid points with signs."""

    def points(self) -> torch.Tensor:
        """Returns the grid, int32 or int64 (points,): four or eight int8 values in each number."""
        values = grid_values(self.name)
        return values.view(torch.int32 if values.shape[-1] == 4 else torch.int64).view(-1)

    def point_words(self) -> torch.Tensor:
        """Returns the grid for kernels, int32: four int8 values in each, the first lowest."""
        return self.points().view(torch.int32)

    @staticmethod
    def signs() -> torch.Tensor:
        """Returns the signs of eight values for every byte, as a table for `lookup`."""
        return bit_table(1, -1)

    @staticmethod
    def even_signs() -> torch.Tensor:
        """Returns the signs of eight values for every 7-bit code, as a table for `lookup`.

        The eighth sign makes the number of minus signs even.
        """
        from gguf import quants

        return bit_table(1, -1)[list(quants.IQ2_XXS.ksigns)]
