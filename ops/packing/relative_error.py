"""Checks whether a type can hold a weight's values: error power over signal power, on a sample.

A type with float16 scales turns values below their range into zeros, without an error when packing.
So does a scale of many values where one of them is far larger than the others, which hides their
error in the sum: hence rows are looked at by themselves, too.
"""
import torch

from ..layers.product import dequantize
from ..tensor.packed_layout import is_packed
from ..tensor.row_slicing import take_rows

SAMPLE_VALUES = 1 << 20  # of each piece
# error power over signal power: above what Q2_K ever loses, a type does not hold the values
LOST = 0.25
# A value that has lost this share of itself is gone. A row is emptied where no more than one in
# KEPT of its values is left, and those that are gone have at least DEAD of the usual magnitude.
GONE, KEPT, DEAD = 0.9, 100, 1e-3
CACHED_VALUES = 1 << 18  # whose magnitudes stay in a processor's cache
PEAKS = 4  # rows with the largest values, which are looked at beside the sample


class RelativeError:
    """Adds up the error of the pieces of a weight, in float64, where every float32 has a square."""

    def __init__(self):
        self.error = 0.0
        self.power = 0.0
        self.has_emptied_row = False

    def add(self, values: torch.Tensor, piece: torch.Tensor):
        """Adds a piece on the CPU, packed or plain, made from `values` of any float dtype."""
        if not values.ndim:
            values, piece = values.view(1), piece.view(1)
        count = max(1, SAMPLE_VALUES * len(values) // values.numel())
        sample = values[:count].cpu().double()
        error = float_values(piece, count).double().sub_(sample)
        if values.ndim > 1:
            rows = values.flatten(1)
            peaks = torch.cat([part.abs().amax(1) for part in rows.split(
                max(1, CACHED_VALUES // rows.shape[1]))]).topk(min(PEAKS, len(values))).indices
            largest = values[peaks].cpu().double()
            of_largest = float_values(take_rows(piece, peaks.cpu())).double().sub_(largest)
            self.has_emptied_row |= (_has_emptied_row(sample, error, sample)
                                     or _has_emptied_row(largest, of_largest, sample))
        self.error += error.square_().sum().item()
        self.power += sample.square_().sum().item()

    @property
    def share(self) -> float:
        """The error's power over that of the values, 0 where nothing was added."""
        return self.error / self.power if self.power else 0.0

    @property
    def is_small(self) -> bool:
        """Whether the type holds the values; False if they became NaN."""
        return self.error <= LOST * self.power and not self.has_emptied_row

    def is_held(self, output_error: float | None) -> bool:
        """Whether the type holds the values, or at least what the layer computes with them: packing
        for known inputs gives up values that hardly count.

        Args:
            output_error: Power of the error of the layer's output over the output's, None where it
                is not known.
        """
        return self.is_small or (output_error is not None and output_error <= LOST
                                 and not self.has_emptied_row)


def _usual_magnitude(values: torch.Tensor) -> float:
    """Returns the mean magnitude of the middle one of some rows (N, ...), without its largest."""
    magnitudes = values.flatten(1).abs()
    others = magnitudes.sum(1) - magnitudes.amax(1)
    return (others / max(1, magnitudes.shape[1] - 1)).median().item()


def _has_emptied_row(values: torch.Tensor, errors: torch.Tensor, sample: torch.Tensor) -> bool:
    """Returns whether packing has left next to nothing of a row of values (N, ...).

    sample: rows of the weight, which say what the usual magnitude is.
    """
    values, errors = values.flatten(1), errors.flatten(1)
    most = 1 + values.shape[1] // KEPT
    gone_or_zero = (errors.abs() >= GONE * values.abs()).sum(1)
    rows = (gone_or_zero >= values.shape[1] - most).nonzero().view(-1)
    if not len(rows):  # nearly always, so what follows costs nothing
        return False
    magnitudes, errors = values[rows].abs(), errors[rows].abs()
    is_gone = (errors >= GONE * magnitudes) & (magnitudes > 0)
    gone = is_gone.sum(1)
    size = (magnitudes * is_gone).sum(1) / gone.clamp(min=1)
    return bool(((gone > most) & (size > DEAD * _usual_magnitude(sample))).any())


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
