"""Codes of a weight's columns chosen one after another, where each column takes up what was lost in
those before it.

Columns lie along the first dimension, (columns, rows), so that each step is one operation on
contiguous memory.
"""
import torch

from .format import Fit, Grid, inverse
from .grid_search import Search

CHUNK = 256  # see `columns_at_a_time`


def columns_at_a_time(grid: Grid) -> int:
    """Columns, whole blocks, that are gone through one by one before all later ones take up at once
    what was lost in them."""
    return max(1, CHUNK // grid.length) * grid.length


class Columns:
    """What is chosen so far for n rows of k columns: the numbers of a `Fit`, the columns along the
    first dimension.

    levels: float32 (k, n). d, dmin: float32 (k / length, n). scales, minima: float32 (k / group,
    n).
    """

    def __init__(self, grid: Grid, levels, d, scales, dmin=None, minima=None):
        self.grid, self.levels, self.d, self.scales, self.dmin, self.minima = (
            grid,
            levels,
            d,
            scales,
            dmin,
            minima,
        )

    @classmethod
    def like(cls, grid: Grid, target: torch.Tensor) -> "Columns":
        """Of nothing chosen yet for `target`, float32 (k, n)."""
        columns, rows = target.shape
        supers, integers = (columns // grid.length, rows), (columns // grid.group, rows)
        minimum = (target.new_zeros(supers), target.new_ones(integers)) if grid.minimum else ()
        return cls(grid, torch.zeros_like(target), target.new_zeros(supers),
                   target.new_ones(integers), *minimum)

    def parts(self) -> list[torch.Tensor]:
        """All that is chosen."""
        return [
            part for part in (self.levels, self.d, self.scales, self.dmin, self.minima)
            if part is not None
        ]

    def part(self, first: int, last: int) -> "Columns":
        """A view of columns `first` up to `last`, whole blocks."""
        all_columns = len(self.levels)
        return Columns(
            self.grid,
            *(part[first * len(part) // all_columns:last * len(part) // all_columns]
              for part in self.parts()))

    def values(self) -> torch.Tensor:
        """What the codes stand for, (k, n)."""
        groups = self.levels.unflatten(0, (-1, self.grid.groups, self.grid.group))
        unit = self.d.unsqueeze(1) * self.scales.unflatten(0, (-1, self.grid.groups))
        values = groups * unit.unsqueeze(2)
        if self.dmin is not None:
            values -= (self.dmin.unsqueeze(1) *
                       self.minima.unflatten(0, (-1, self.grid.groups))).unsqueeze(2)
        return values.flatten(0, 2)

    def fit(self, search: Search) -> Fit:
        """The blocks of the rows in order."""
        def by_rows(part):
            if part is None:
                return None
            turned = part.unflatten(0, (len(self.d), -1)).movedim(-1, 0)
            return turned.clone(memory_format=torch.contiguous_format).flatten(0, 1)

        return Fit(by_rows(search.codes(self.levels)),
                   *map(by_rows, (self.d, self.scales, self.dmin, self.minima)))


def choose_columns(search: Search, values: torch.Tensor, shares: torch.Tensor,
                   weights: torch.Tensor | None, chosen: Columns, tries: int, rounds: int):
    """Chooses the codes of up to `columns_at_a_time` columns in order; `chosen` gets them. With
    `weights`, of the scales too.

    shares: float32 (k, k); column j takes up shares[i, j] times what was lost in column i, for all
    i < j.
    weights: float32 (k,), of squared errors where the scales are searched, each when its group is
    reached, from what the values have become; see `Search.fit_group`. Then `values`, float32 (k,
    n), are what to represent, and lost is what the codes lack of that. None: the scales are kept,
    and `values` are what to add to what the codes in `chosen` stand for; what they then stand for
    more than before is handed on. `values` are overwritten by what was lost or handed on.
    """
    group = search.grid.group
    for first in range(0, len(values), group):
        stop = first + group
        if weights is not None:
            _choose_scales(search, values, weights, chosen, first, tries, rounds)
        rounded = _Rounder(search, chosen, first)
        for column in range(first, stop):
            wanted = values[column]
            if column > first:
                wanted.addmv_(values[first:column].T, shares[first:column, column])
            if weights is not None:
                chosen.levels[column], value = rounded(wanted)
                wanted -= value
            else:
                before = rounded.value(chosen.levels[column])
                chosen.levels[column], value = rounded(wanted.add_(before))
                torch.sub(value, before, out=wanted)
        values[stop:].addmm_(shares[first:stop, stop:].T, values[first:stop])


def _choose_scales(search: Search, values: torch.Tensor, weights: torch.Tensor, chosen: Columns,
                   first: int, tries: int, rounds: int):
    """The scales of the group that begins at column `first`, and at the first of a block its
    super-scales."""
    length, group, weights = search.grid.length, search.grid.group, weights.unsqueeze(0)
    block, index = first // length, first // group
    if first % length == 0:
        fit = search.fit(values[first:first + length].T, weights[:, first:first + length], tries,
                         rounds, 0)
        chosen.d[block], scales, minima = fit.d[:, 0], fit.scales, fit.minima
        if minima is not None:
            chosen.dmin[block] = fit.dmin[:, 0]
    else:
        d, dmin = (None if part is None else part[block].unsqueeze(-1)
                   for part in (chosen.d, chosen.dmin))
        scales, minima = search.fit_group(values[first:first + group].T,
                                          weights[:, first:first + group], d, dmin, tries, rounds)
    chosen.scales[index] = scales[:, 0]
    if minima is not None:
        chosen.minima[index] = minima[:, 0]


class _Rounder:
    """Rounds columns of one group of n rows: rounder((n,)) -> (levels, values), each (n,)."""

    def __init__(self, search: Search, chosen: Columns, column: int):
        block, group = column // search.grid.length, column // search.grid.group
        self._nearest, self._unit = search.nearest_levels, chosen.d[block] * chosen.scales[group]
        self._inverse = inverse(self._unit)
        offset = None if chosen.dmin is None else chosen.dmin[block] * chosen.minima[group]
        self._offset = None if offset is None else -offset
        self._shift = None if offset is None else offset * self._inverse

    def __call__(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = (
            column * self._inverse
            if self._shift is None
            else torch.addcmul(self._shift, column, self._inverse)
        )
        levels = self._nearest(scaled)
        return levels, self.value(levels)

    def value(self, levels: torch.Tensor) -> torch.Tensor:
        return (
            levels * self._unit
            if self._offset is None
            else torch.addcmul(self._offset, levels, self._unit)
        )
