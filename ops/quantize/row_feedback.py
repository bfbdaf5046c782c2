"""Error feedback for rows whose scales are chosen; see `error_feedback`."""
import torch

from .damped_hessian import DampedHessian, slice_rows
from .error_feedback import SWEEPS, check_columns
from .grid_error_feedback import CHUNK
from .row_encoder import RowEncoder, RowNumbers
from .second_moments import SecondMoments


def feed_back(weight: torch.Tensor, encoder: RowEncoder, numbers: RowNumbers,
              moments: SecondMoments) -> RowNumbers:
    """Chooses codes whose errors cancel in the output of a layer, and keeps the scales.

    Args:
        weight: (N, K) of any float dtype.
        encoder: of its format.
        numbers: of its rows, as searched.
        moments: of the inputs.

    Returns:
        Numbers with other levels.

    Raises:
        FormatError: the moments are of another number of inputs.
    """
    check_columns(weight, moments)
    moments = _in_basis(moments, encoder)
    group = encoder.layout.group
    levels = torch.empty_like(numbers.levels).flatten(1)
    for index, span in enumerate(moments.spans()):
        damped = DampedHessian(moments, index, weight.device)
        for rows in slice_rows(len(weight), span.stop - span.start, weight.device):
            part = numbers.rows(rows)
            values = encoder.basis(weight[rows].float()) * (1 / part.of_rows).flatten(1)
            units = part.units.expand(-1, -1, group).flatten(1)[:, span]
            target = damped.target(values[:, span])
            levels[rows, span] = _choose(encoder, target.T.contiguous(), units.T.contiguous(),
                                         damped).T
    return RowNumbers(levels.view_as(numbers.levels), numbers.units, numbers.of_rows)


def _in_basis(moments: SecondMoments, encoder: RowEncoder) -> SecondMoments:
    """Returns the moments of inputs that are rotated as the rows of a weight are."""
    if not encoder.layout.rotation:
        return moments

    def rotated(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([encoder.basis(encoder.basis(block.float()).T.contiguous()).T
                            for block in blocks])

    cross, dense = moments.cross, moments.dense_sketch
    return SecondMoments(moments.columns, rotated(moments.blocks), encoder.basis(moments.sketch),
                         None if cross is None else rotated(cross),
                         None if dense is None else encoder.basis(dense), moments.count,
                         moments.held_out_count)


def _choose(encoder: RowEncoder, target: torch.Tensor, units: torch.Tensor,
            damped: DampedHessian) -> torch.Tensor:
    """Returns the numbers of codes of some columns.

    Args:
        encoder: of the format.
        target: the values, float32 (k, n).
        units: of each value, (k, n).
        damped: of the k columns.
    """
    steps = damped.steps
    levels, values = torch.empty_like(target), target.clone()
    for column in _columns(values, damped.shares):
        levels[column] = encoder.nearest(values[column], units[column])
        values[column] -= encoder.values(levels[column], units[column])
    for _ in range(SWEEPS):
        # half the slope of the loss along each column, divided by its curvature
        values = steps.T @ encoder.values(levels, units).sub_(target)
        for column in _columns(values, steps):
            before = encoder.values(levels[column], units[column])
            levels[column] = encoder.nearest(values[column] + before, units[column])
            values[column] = encoder.values(levels[column], units[column]) - before
    return levels


def _columns(values: torch.Tensor, shares: torch.Tensor):
    """Yields columns in order; the caller replaces each one's values by its residual, of which all
    later columns get their shares."""
    for first in range(0, len(values), CHUNK):
        stop = min(first + CHUNK, len(values))
        for column in range(first, stop):
            if column > first:
                values[column].addmv_(values[first:column].T, shares[first:column, column])
            yield column
        values[stop:].addmm_(shares[first:stop, stop:].T, values[first:stop])
