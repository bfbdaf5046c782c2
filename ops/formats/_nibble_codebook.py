"""Base of formats whose 4-bit codes select one of 16 values."""
import torch

from .base import Format
from .bits import bit_planes, lookup


class NibbleCodebook(Format):
    """Base of formats that look a 4-bit code up in `values`, 16 integers that fit int8."""

    values: tuple[int, ...]

    def value_pairs(self) -> torch.Tensor:
        """Returns the values of two codes, int16 (3856,), indexed by two bytes of one code each."""
        values = torch.tensor(self.values, dtype=torch.int8)
        index = torch.arange(0x0F0F + 1)
        return torch.stack([values[index & 15], values[index >> 8]], -1).view(torch.int16).view(-1)

    def code_values(self, packed: torch.Tensor) -> torch.Tensor:
        """Returns the values, int8 (..., 2 B), of packed codes, uint8 (..., B).

        The low nibbles come first, then the high ones.
        """
        codes = bit_planes(packed, 4).flatten(-2)
        value_pairs = self.constant("value_pairs", packed.device)
        return lookup(value_pairs, codes.view(torch.int16)).flatten(-2)
