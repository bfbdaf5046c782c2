"""Checks whether a type can hold a weight's values: error power over signal power, on a sample.

A type with float16 scales turns values below their range into zeros, without an error when packing.
"""
import torch

from ..layers.product import dequantize
from ..tensor.packed_layout import is_packed
from ..tensor.row_slicing import take_rows

SAMPLE_VALUES = 1 << 20  # of each piece
# error power over signal power: above what Q2_K ever loses, a type does not hold the values
LOST = 0.25


class RelativeError:
    """Adds up the error of the pieces of a weight, in float64, where every float32 has a square."""

    def __init__(self):
        self.error = 0.0
        self.power = 0.0

    def add(self, values: torch.Tensor, piece: torch.Tensor):
        """Adds a piece on the CPU, packed or plain, made from `values` of any float dtype."""
        if not values.ndim:
            values, piece = values.view(1), piece.view(1)
        count = max(1, SAMPLE_VALUES * len(values) // values.numel())
        sample = values[:count].cpu().double()
        self.error += (float_values(piece, count) - sample).square_().sum().item()
        self.power += sample.square_().sum().item()

    def include(self, other: "RelativeError"):
        """Adds the pieces of another sum."""
        self.error += other.error
        self.power += other.power

    @property
    def share(self) -> float:
        """The error's power over that of the values, 0 where nothing was added."""
        return self.error / self.power if self.power else 0.0

    @property
    def is_small(self) -> bool:
        """Whether the type holds the values; False if they became NaN."""
        return self.error <= LOST * self.power


def holds(piece: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a whole weight, packed or plain, holds the values it was made from."""
    relative_error = RelativeError()
    relative_error.add(values, piece)
    return relative_error.is_small


def float_values(piece: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Returns the values of a piece, packed or plain, or of its first rows, in float32."""
    if piece.ndim and rows is not None:
        piece = take_rows(piece, slice(0, rows))
    return dequantize(piece, torch.float32) if is_packed(piece) else piece.float()
