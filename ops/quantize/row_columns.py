"""Chooses codes of rows column by column, and the scales of groups; see `column_order`."""
import torch

from .column_order import CHUNK, choose_in_order, feed_back
from .damped_hessian import DampedHessian
from .row_encoder import EncodedRows, RowEncoder
from .second_moments import SecondMoments

GROUP = 32  # columns that are chosen one by one where a row has one scale


class _Rounder:
    """Rounds columns (n,) of rows with units (n,)."""

    def __init__(self, encoder: RowEncoder, units: torch.Tensor):
        self._encoder, self._units = encoder, units

    def __call__(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = self._encoder.nearest(column, self._units)
        return levels, self.value(levels)

    def value(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the values of levels."""
        return self._encoder.values(levels, self._units)


def in_basis(moments: SecondMoments, encoder: RowEncoder) -> SecondMoments:
    """Returns the moments of inputs that are rotated as the rows of a weight are."""
    if not encoder.layout.rotation:
        return moments

    def rotated(blocks: torch.Tensor) -> torch.Tensor:
        return encoder.basis(encoder.basis(blocks.float()).mT.contiguous()).mT

    return SecondMoments(moments.columns, rotated(moments.blocks), encoder.basis(moments.sketch),
                         moments.count, moments.held_out_count)


def target_of(encoder: RowEncoder, rows: torch.Tensor, encoded: EncodedRows,
              span: slice) -> torch.Tensor:
    """Returns the values that codes are to represent times their units, float32 (n, k).

    The arguments are those of `choose_codes`.
    """
    values = encoder.basis(rows[:, span].float())
    if encoded.row_scale is not None:
        values = values * (1 / encoded.row_scale)
    return values


def choose_codes(encoder: RowEncoder, rows: torch.Tensor, encoded: EncodedRows, span: slice,
                 damped: DampedHessian):
    """Writes codes of some columns whose errors cancel in the output of a layer.

    The scale of a row is kept. That of a group is searched when its first column is reached, from
    what its values are then.

    Args:
        encoder: of the format.
        rows: (n, K) of any float dtype.
        encoded: of n rows with scales; the codes of the columns are overwritten, and the scales of
            their groups.
        span: the k columns, whole groups and rotations.
        damped: of the moments of their inputs in the basis of the codes.
    """
    target = target_of(encoder, rows, encoded, span).T.contiguous()
    levels, groups = torch.empty_like(target), groups_of(encoder, span)
    units = encoder.units(encoded)[:, groups].T.contiguous()
    group = len(target) // len(units)

    def choose(values: torch.Tensor, shares: torch.Tensor, columns: slice, is_first: bool):
        def begin(first: int) -> _Rounder:
            unit = units[(columns.start + first) // group]
            if is_first and searches_groups(encoder):
                part = slice(first, first + group)
                peak = values[part].abs().amax(0).unsqueeze(-1)
                found = encoder.fit(values[part].T.contiguous(), peak,
                                    damped.weights[columns][part])[1]
                unit.copy_(found.squeeze(-1))
            return _Rounder(encoder, unit)

        choose_in_order(values, shares, levels[columns], begin, min(GROUP, group), is_first)

    def values_of_codes() -> torch.Tensor:
        each = units.repeat_interleave(group, 0) if len(units) > 1 else units
        return encoder.values(levels, each)

    feed_back(choose, values_of_codes, target, damped, CHUNK)
    encoder.write_codes(levels.T, encoded.codes[:, encoder.bytes_of(span)])
    if searches_groups(encoder):
        encoder.write_scales(units.T, encoded.scale[:, groups])


def searches_groups(encoder: RowEncoder) -> bool:
    """Returns whether scales are searched once the columns before them are chosen."""
    return encoder.layout.scale.kind != "f32"


def groups_of(encoder: RowEncoder, span: slice) -> slice:
    """Returns the groups that have the scales of some columns."""
    if encoder.layout.groups == 1:
        return slice(0, 1)
    return slice(span.start // encoder.layout.group, span.stop // encoder.layout.group)
