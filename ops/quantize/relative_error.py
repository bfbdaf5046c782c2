"""Whether a type holds the values of a weight, by the power of the error of a sample of its rows
over that of the values.

Types whose scales are float16 make zeros of values below its range, and packing to them does not
fail.
"""
import torch

from ..packed_layout import is_packed
from ..product import dequantize
from ..row_slicing import take_rows

SAMPLE_VALUES = 1 << 20  # of each piece
# power of a weight's error over its own; a type that loses more than Q2_K ever does cannot hold its
# values
LOST = 0.25


class RelativeError:
    """Adds up the error of the pieces of a weight, in float64, in which no float32 is too small or
    too large to be squared."""

    def __init__(self):
        self.error = self.power = 0.0

    def add(self, values: torch.Tensor, piece: torch.Tensor):
        """Take a piece into account. values: what it was made from, any float dtype, on the CPU."""
        if not values.ndim:
            values, piece = values.view(1), piece.view(1)
        count = max(1, SAMPLE_VALUES * len(values) // values.numel())
        sample = values[:count].double()
        self.error += (float_values(piece, count) - sample).square_().sum().item()
        self.power += sample.square_().sum().item()

    @property
    def is_small(self) -> bool:
        """Whether the type holds the values. False where they became NaN."""
        return self.error <= LOST * self.power


def holds(piece: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a whole weight, packed or plain, is what it was made from, `values`."""
    relative_error = RelativeError()
    relative_error.add(values, piece)
    return relative_error.is_small


def float_values(piece: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """float32 values of a piece, of its first rows only where that is enough."""
    if not is_packed(piece):
        return piece[:rows].float() if piece.ndim else piece.float()
    return dequantize(piece if rows is None else take_rows(piece, slice(0, rows)), torch.float32)
