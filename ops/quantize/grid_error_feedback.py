"""Chooses scales and codes of a format with a grid column by column; see `column_order`."""
import dataclasses

import torch

from ..formats.base import Fit, Grid, inverse
from .column_order import CHUNK, choose_in_order
from .grid_search import Search


def columns_at_a_time(grid: Grid) -> int:
    """Returns how many columns are chosen one by one before all later ones compensate their errors.

    They are whole blocks.
    """
    return max(1, CHUNK // grid.length) * grid.length


@dataclasses.dataclass
class Columns:
    """The numbers chosen so far for n rows of k columns; see `Fit`.

    Attributes:
        grid: of the format.
        levels: float32 (k, n).
        d: float32 (k / length, n).
        scales: float32 (k / group, n).
        dmin: like `d`; None for grids without a minimum.
        minima: like `scales`; None for grids without a minimum.
    """

    grid: Grid
    levels: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    @classmethod
    def like(cls, grid: Grid, target: torch.Tensor) -> "Columns":
        """Returns numbers that represent zeros, for a `target`, float32 (k, n)."""
        columns, rows = target.shape
        supers, integers = (columns // grid.length, rows), (columns // grid.group, rows)
        minimum = (target.new_zeros(supers), target.new_ones(integers)) if grid.minimum else ()
        return cls(grid, torch.zeros_like(target), target.new_zeros(supers),
                   target.new_ones(integers), *minimum)

    def parts(self) -> list[torch.Tensor]:
        """Returns all tensors."""
        return [
            part for part in (self.levels, self.d, self.scales, self.dmin, self.minima)
            if part is not None
        ]

    def part(self, first: int, last: int) -> "Columns":
        """Returns a view of columns `first` up to `last`, whole blocks."""
        count = len(self.levels)
        return Columns(
            self.grid,
            *(part[first * len(part) // count:last * len(part) // count] for part in self.parts()))

    def values(self) -> torch.Tensor:
        """Returns the values that the codes represent, (k, n)."""
        groups = self.levels.unflatten(0, (-1, self.grid.groups, self.grid.group))
        unit = self.d.unsqueeze(1) * self.scales.unflatten(0, (-1, self.grid.groups))
        values = groups * unit.unsqueeze(2)
        if self.dmin is not None and self.minima is not None:
            minima = self.minima.unflatten(0, (-1, self.grid.groups))
            values -= (self.dmin.unsqueeze(1) * minima).unsqueeze(2)
        return values.flatten(0, 2)

    def fit(self, search: Search) -> Fit:
        """Returns the blocks of the rows in order."""
        def by_rows(part: torch.Tensor) -> torch.Tensor:
            rows_first = part.unflatten(0, (len(self.d), -1)).movedim(-1, 0)
            return rows_first.clone(memory_format=torch.contiguous_format).flatten(0, 1)

        return Fit(by_rows(search.codes(self.levels)), *map(by_rows, self.parts()[1:]))


def choose_columns(search: Search, values: torch.Tensor, shares: torch.Tensor,
                   weights: torch.Tensor | None, chosen: Columns, tries: int, rounds: int):
    """Chooses the codes of up to `columns_at_a_time` columns in order, perhaps their scales too.

    With `weights`, the scales of a group are searched when it is reached, from what its values are
    then (see `Search.fit_group`). Without them the scales are kept.

    Args:
        search: over the format's grid.
        values: float32 (k, n), see `choose_in_order`, as `shares`.
        shares: float32 (k, k).
        weights: float32 (k,), of the squared errors in the search of the scales, for the first
            time; None: later.
        chosen: of the k columns, overwritten.
        tries: see `Search.fit`.
        rounds: see `Search.fit`.
    """
    def begin(first: int) -> _Rounder:
        if weights is not None:
            _choose_scales(search, values, weights, chosen, first, tries, rounds)
        return _Rounder(search, chosen, first)

    choose_in_order(values, shares, chosen.levels, begin, search.grid.group, weights is not None)


def _choose_scales(search: Search, values: torch.Tensor, weights: torch.Tensor, chosen: Columns,
                   first: int, tries: int, rounds: int):
    """Chooses the scales of the group at column `first`, and super-scales where a block begins."""
    length, group = search.grid.length, search.grid.group
    weights = weights.unsqueeze(0)
    block, index = first // length, first // group
    if first % length == 0:
        fit = search.fit(values[first:first + length].T, weights[:, first:first + length], tries,
                         rounds, 0)
        chosen.d[block] = fit.d[:, 0]
        if chosen.dmin is not None and fit.dmin is not None:
            chosen.dmin[block] = fit.dmin[:, 0]
        scales, minima = fit.scales, fit.minima
    else:
        d = chosen.d[block].unsqueeze(-1)
        dmin = None if chosen.dmin is None else chosen.dmin[block].unsqueeze(-1)
        scales, minima = search.fit_group(values[first:first + group].T,
                                          weights[:, first:first + group], d, dmin, tries, rounds)
    chosen.scales[index] = scales[:, 0]
    if chosen.minima is not None and minima is not None:
        chosen.minima[index] = minima[:, 0]


class _Rounder:
    """Rounds columns (n,) of one group of n rows to (levels, values), each (n,)."""

    def __init__(self, search: Search, chosen: Columns, column: int):
        block, group = column // search.grid.length, column // search.grid.group
        self._nearest_levels = search.nearest_levels
        self._unit = chosen.d[block] * chosen.scales[group]
        self._inverse = inverse(self._unit)
        self._negative_offset = self._shift = None
        if chosen.dmin is not None and chosen.minima is not None:
            offset = chosen.dmin[block] * chosen.minima[group]
            self._negative_offset = -offset
            self._shift = offset * self._inverse

    def __call__(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._shift is None:
            scaled = column * self._inverse
        else:
            scaled = torch.addcmul(self._shift, column, self._inverse)
        levels = self._nearest_levels(scaled)
        return levels, self.value(levels)

    def value(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the values of levels."""
        if self._negative_offset is None:
            return levels * self._unit
        return torch.addcmul(self._negative_offset, levels, self._unit)
