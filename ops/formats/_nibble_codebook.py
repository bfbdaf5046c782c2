"""Formats whose nibbles name one of 16 values."""
import torch

from ..bits import bit_planes, lookup
from ..format import Format


class NibbleCodebook(Format):
    """Base of formats that look a 4-bit code up in `values`, 16 integers that fit int8."""

    values: tuple[int, ...]

    @classmethod
    def value_pairs(cls) -> torch.Tensor:
        """int16 (3856,): the values of two codes, indexed by two neighbouring bytes that hold a
        code each."""
        values = torch.tensor(cls.values, dtype=torch.int8)
        index = torch.arange(0x0F0F + 1)
        return torch.stack([values[index & 15], values[index >> 8]], -1).view(torch.int16).view(-1)

    @classmethod
    def code_values(cls, packed: torch.Tensor) -> torch.Tensor:
        """Values, int8 (..., 2 B), of packed codes, uint8 (..., B): the low nibbles, then the high
        ones."""
        codes = bit_planes(packed, 4).flatten(-2)
        return lookup(cls.constant("value_pairs", packed.device),
                      codes.view(torch.int16)).flatten(-2)
