"""Searches the codes and scales of least error, for every format with a `Grid`.

It looks for the numbers of a `Fit` with the least sum of weight * (value - represented)**2 over a
block. For each group several scales are tried: a scale gives codes, and these give the scale (and
offset) of least squares. The scales are then rounded as the format stores them, under super-scales
that all groups of a block share, and integers, codes and super-scales are improved in turns. All
arithmetic is float32, block by block, so that packing a part of a weight gives a part of the packed
weight. The values of a block are first multiplied by a power of two, which is exact, so that their
squares and products stay in float32's range whatever their size. Where they would have stayed there
anyway, no bit of the result changes.

Inside, the values of a group lie along the first dimension, (group, ..., groups), so that sums over
it are sums of whole vectors. A group has a `unit` (d * scale) and an `offset` (dmin * minimum):
value = unit * level - offset.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..formats.base import Fit, Grid, inverse, powers_of_two
from ..formats.bits import select

# How far before or beyond the ends of the levels the first scales put a group's extremes: in
# levels, where these are integers, and otherwise as a fraction of the last level.
STRETCH_LEVELS, STRETCH_FRACTION = (-0.9, 0.9), (-0.12, 0.24)
# Levels that are not consecutive integers are looked up by a cell of their range. There are so many
# cells that none contains a middle between two of IQ4's levels, which are multiples of a half; with
# other formats' levels very few do.
CELLS = 4800
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0
LARGEST_FLOAT = torch.finfo(torch.float32).max


class Search:
    """The search over one grid on one device."""

    def __init__(self, grid: Grid, device: torch.device):
        self.grid = grid
        self.lowest, self.highest = grid.levels[0], grid.levels[-1]
        self.integers = grid.scales or (1, 1)  # smallest and largest scale and minimum
        levels = torch.tensor(grid.levels, dtype=torch.float32, device=device)
        self.cells_per_unit = CELLS / (self.highest - self.lowest)
        cells = torch.arange(CELLS, dtype=torch.float32, device=device)
        nearest = torch.bucketize((cells + 0.5) / self.cells_per_unit + self.lowest,
                                  (levels[1:] + levels[:-1]) / 2)
        self.levels_of_cells = levels[nearest]
        self.codes_of_cells = nearest.to(torch.uint8)

    def fit(self, values: torch.Tensor, weights: torch.Tensor | None = None, tries: int = 9,
            rounds: int = 1, sweeps: int = 1, emphasis: bool = False) -> Fit:
        """Returns the best numbers for some blocks, all zeros where nothing else is nearer.

        Args:
            values: float32 (..., length).
            weights: float32, at least 0, of a shape that broadcasts to that of `values`; None: all
                equal.
            tries: number of first scales.
            rounds: how often the best one is improved.
            sweeps: how often integers and super-scales are improved in turns.
            emphasis: whether errors of large values count more, as in ggml's
                `quantize_row_q2_K_impl`: times the root of the value's square plus the mean square
                of its block.
        """
        factor, unscale = powers_of_two(
            torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True)))
        values = values * factor
        if emphasis:
            squares = values.square()
            large = (squares + squares.mean(-1, keepdim=True)).sqrt_()
            weights = large if weights is None else large * weights
        groups = _Groups(values, weights, self.grid)
        groups.factor = factor
        groups.unscale = unscale
        best = self._first_numbers(groups, *self.start(groups, tries, rounds))
        error = _over_groups(self._error(groups, best))
        for _ in range(sweeps):
            improved = self._improve_integers(groups, best)
            for candidate in (improved, self._improve_supers(groups, improved)):
                candidate_error = _over_groups(self._error(groups, candidate))
                better = candidate_error < error
                error = torch.where(better, candidate_error, error)
                best = candidate.where(better, best)
        nearer_than_zeros = error <= _over_groups(groups.squares)
        best = best._replace(d=best.d * nearer_than_zeros,
                             dmin=None if best.dmin is None else best.dmin * nearer_than_zeros)
        return self._as_fit(groups, best)

    def fit_quickly(self, values: torch.Tensor) -> Fit:
        """Returns blocks of one group, without a minimum, whose levels just reach their peaks.

        Args:
            values: float32 (n, length).
        """
        peak = values.abs().amax(-1, keepdim=True)
        d = self._stored(peak / self.highest)
        # below the normal range d may be rounded down far
        d = torch.where(peak > d * (self.highest + 0.5), d + SMALLEST_HALF, d)
        return Fit(self.codes(self.round(values, d)), d, torch.ones_like(d))

    def fit_group(self, values: torch.Tensor, weights: torch.Tensor | None, d: torch.Tensor,
                  dmin: torch.Tensor | None, tries: int = 7,
                  rounds: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the integers of one group of n blocks whose super-scales are chosen.

        Args:
            values: float32 (n, group).
            weights: float32 (1 or n, group), or None.
            d: float32 (n, 1); see `Fit`.
            dmin: float32 (n, 1); see `Fit`.
            tries: see `fit`.
            rounds: see `fit`.

        Returns:
            (scale, minimum), float32 (n, 1).
        """
        groups = _Groups(values, weights, self.grid, 1)
        scale, minimum = self._rounded(*self.start(groups, tries, rounds), d, dmin)
        best = self._improve_integers(groups, _Numbers(d, dmin, scale, minimum))
        return best.scales, best.minima

    def round(self, values: torch.Tensor, unit: torch.Tensor,
              offset: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the levels, float32, nearest to `values`; that of 0 where the unit is 0.

        The shapes of the arguments broadcast.
        """
        return self.nearest_levels((values if offset is None else values + offset) * inverse(unit))

    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        """Returns the levels, float32, nearest to values over their scale; overwrites those."""
        if self.grid.uniform:
            return scaled.round_().clamp_(self.lowest, self.highest)
        return self._by_cell(self.levels_of_cells, scaled)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the codes, uint8, of levels that `round` returned."""
        if self.grid.uniform:
            return (levels - self.lowest).to(torch.uint8)
        return self._by_cell(self.codes_of_cells, levels.clone())

    def _by_cell(self, table: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        cells = scaled.sub_(self.lowest).mul_(self.cells_per_unit).clamp_(0, CELLS - 1).int()
        return select(table, cells.view(-1)).view(cells.shape)

    def start(self, groups: "_Groups", tries: int,
              rounds: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns unit and offset of each group, (..., groups), before rounding.

        The offset is None for grids without a minimum.
        """
        best = None
        for unit, offset in self._first_units(groups, tries):
            levels = self.round(groups.values, unit, offset)
            best = self._least_squares(groups, levels).better_of(best)
        assert best is not None
        for _ in range(rounds):
            levels = self.round(groups.values, best.unit, best.offset)
            best = self._least_squares(groups, levels).better_of(best)
        return best.unit, best.offset

    def _first_units(self, groups: "_Groups",
                     tries: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields units and offsets that put the extremes of each group near the end levels."""
        low, high = groups.values.amin(0), groups.values.amax(0)
        reach = STRETCH_LEVELS if self.grid.uniform else STRETCH_FRACTION
        stretches = torch.linspace(*reach, tries, dtype=torch.float32).tolist()
        if self.grid.minimum:
            if self.grid.scales:
                low = low.clamp(max=0)  # the minimum that is subtracted is never negative
            for stretch in stretches:
                yield (high - low) / (self.highest + stretch), -low
            return
        peak = torch.where(high > -low, high, low)
        nearer = torch.where(peak < 0, self.lowest, torch.full_like(peak, self.highest))
        ends = (self.lowest, self.highest) if self.grid.signed else (nearer,)
        if self.grid.signed and self.grid.uniform:
            # the other end is a stretch of this one with the other sign, and has one level less
            ends = ends[:1]
        for stretch in stretches:
            if self.grid.uniform:
                stretch /= self.highest
            for end in ends:
                yield peak / (end * (1 + stretch)), None

    def _least_squares(self, groups: "_Groups", levels: torch.Tensor) -> "_Units":
        """Returns the best units and offsets of groups with these levels.

        The error is infinite where the format does not allow them.
        """
        squares, products, total = groups.sums(levels)
        if not self.grid.minimum:
            unit = products * inverse(squares)
            error = groups.squares - unit * products
            if not self.grid.signed:
                error = torch.where(unit >= 0, error, torch.inf)
            return _Units(unit, None, error)
        determinant = groups.weight * squares - total * total
        sound = determinant > 1e-6 * groups.weight * squares
        unit = (groups.weight * products - groups.total * total) * inverse(determinant)
        offset = (total * products - squares * groups.total) * inverse(determinant)
        # Where all levels are the same, a constant is best. Formats with integer scales cannot hold
        # a constant above zero as a minimum.
        constant = -groups.total * inverse(groups.weight)
        unit, offset = torch.where(sound, unit, 0), torch.where(sound, offset, constant)
        if self.grid.scales:
            unit = torch.where(offset < 0, products * inverse(squares), unit)
            offset = offset.clamp(min=0)
        error = (groups.squares + unit * (unit * squares - 2 * products - 2 * offset * total)
                 + offset * (offset * groups.weight + 2 * groups.total))
        return _Units(unit, offset, torch.where(unit >= 0, error, torch.inf))

    def _first_numbers(self, groups: "_Groups", unit: torch.Tensor,
                       offset: torch.Tensor | None) -> "_Numbers":
        """Rounds units and offsets, (..., groups), to super-scales and integers."""
        if not self.grid.scales:
            ones = torch.ones_like(unit)
            if offset is None:
                return _Numbers(self._stored(unit, groups), None, ones, None)
            return _Numbers(self._stored(unit, groups), self._stored(offset, groups, True), ones,
                            ones)
        lowest, highest = self.grid.scales
        if lowest < 0:
            d = self._stored(unit.gather(-1, unit.abs().argmax(-1, keepdim=True)) / lowest, groups)
        else:
            d = self._stored(unit.amax(-1, keepdim=True) / highest, groups)
        dmin = None
        if offset is not None:
            dmin = self._stored(offset.amax(-1, keepdim=True) / highest, groups)
        return _Numbers(d, dmin, *self._rounded(unit, offset, d, dmin))

    def _stored(self, scales: torch.Tensor, groups: "_Groups | None" = None,
                to_zero: bool = False) -> torch.Tensor:
        """Rounds scales as the format stores them.

        Args:
            scales: float32.
            groups: the groups they belong to, if their values were multiplied by a power of two.
            to_zero: whether scales below the range of float16 become zero, not its smallest number.
        """
        if groups is not None:
            return self._stored(scales * groups.unscale, None, to_zero) * groups.factor
        if self.grid.scale_dtype == torch.float32:
            return scales.clamp(-LARGEST_FLOAT, LARGEST_FLOAT)
        rounded = scales.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
        if to_zero:
            return rounded
        smallest = torch.copysign(torch.full_like(scales, SMALLEST_HALF), scales)
        return torch.where((rounded == 0) & (scales != 0), smallest, rounded)

    def _rounded(self, unit: torch.Tensor, offset: torch.Tensor | None, d: torch.Tensor,
                 dmin: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the scale and minimum integers nearest to units and offsets."""
        scales = (unit * inverse(d)).round_().clamp_(*self.integers)
        if offset is None or dmin is None:
            return scales, None
        return scales, (offset * inverse(dmin)).round_().clamp_(*self.integers)

    def _error(self, groups: "_Groups", numbers: "_Numbers") -> torch.Tensor:
        """Returns the weighted squared error of each group, (..., groups)."""
        unit, offset = numbers.unit, numbers.offset
        represented = self.round(groups.values, unit, offset).mul_(unit)
        target = groups.values if offset is None else groups.values + offset
        return groups.squared(represented.sub_(target))

    def _improve_integers(self, groups: "_Groups", numbers: "_Numbers") -> "_Numbers":
        """Returns the numbers with the best integers that differ from theirs by at most one."""
        if not self.grid.scales:
            return numbers
        best = numbers
        error = self._error(groups, numbers)
        for step in (-1, 0, 1):
            for step_of_minima in (-1, 0, 1) if numbers.minima is not None else (0,):
                if step == step_of_minima == 0:
                    continue
                candidate = numbers._replace(
                    scales=(numbers.scales + step).clamp_(*self.integers),
                    minima=None if numbers.minima is None else
                    (numbers.minima + step_of_minima).clamp_(*self.integers))
                candidate_error = self._error(groups, candidate)
                better = candidate_error < error
                error = torch.where(better, candidate_error, error)
                best = best._replace(scales=torch.where(better, candidate.scales, best.scales),
                                     minima=_where(better, candidate.minima, best.minima))
        return best

    def _improve_supers(self, groups: "_Groups", numbers: "_Numbers") -> "_Numbers":
        """Returns the numbers with the super-scales of least squares for codes and integers."""
        d, dmin, scales, minima = numbers
        levels = self.round(groups.values, numbers.unit, numbers.offset)
        squares, products, total = groups.sums(levels)
        aa, ax = _over_groups(scales * scales * squares), _over_groups(scales * products)
        if dmin is None or minima is None:
            new = ax * inverse(aa)
            if not self.grid.signed:
                new = new.clamp(min=0)
            return numbers._replace(d=self._stored(new, groups))
        ab = _over_groups(scales * minima * total)
        bb = _over_groups(minima * minima * groups.weight)
        bx = _over_groups(minima * groups.total)
        determinant = aa * bb - ab * ab
        new = (ax * bb - ab * bx) * inverse(determinant)
        new_min = (ab * ax - aa * bx) * inverse(determinant)
        sound = (determinant > 1e-6 * aa * bb) & (new > 0)
        if self.grid.scales:
            sound &= new_min >= 0
        return numbers._replace(
            d=torch.where(sound, self._stored(new, groups), d),
            dmin=torch.where(sound, self._stored(new_min, groups, True), dmin))

    def _as_fit(self, groups: "_Groups", numbers: "_Numbers") -> Fit:
        levels = self.round(groups.values, numbers.unit, numbers.offset)
        codes = self.codes(levels).movedim(0, -1).contiguous().view(-1, self.grid.length)

        def by_block(part: torch.Tensor) -> torch.Tensor:
            return part.reshape(len(codes), -1)

        d, dmin, scales, minima = numbers
        fit = Fit(codes, by_block(d * groups.unscale), by_block(scales))
        if dmin is not None and minima is not None:
            fit.dmin = by_block(dmin * groups.unscale)
            fit.minima = by_block(minima)
        return fit


def _sum(numbers: torch.Tensor) -> torch.Tensor:
    """Returns `numbers.sum(0)` of 2^n numbers, in an order independent of the other dimensions.

    The order of torch's own sum depends on them.
    """
    half = numbers.shape[0]
    while half > 1:
        half //= 2
        numbers = numbers[:half] + numbers[half:]
    return numbers[0]


def _over_groups(numbers: torch.Tensor) -> torch.Tensor:
    """Returns sums over the groups of a block, (..., 1)."""
    return _sum(numbers.movedim(-1, 0)).unsqueeze(-1)


def _where(condition: torch.Tensor, part: torch.Tensor | None,
           other: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None or other is None else torch.where(condition, part, other)


class _Numbers(NamedTuple):
    """The numbers of a `Fit` without codes: super-scales (..., 1) and integers (..., groups).

    dmin and minima are None for grids without a minimum.
    """

    d: torch.Tensor
    dmin: torch.Tensor | None
    scales: torch.Tensor
    minima: torch.Tensor | None

    @property
    def unit(self) -> torch.Tensor:
        return self.d * self.scales

    @property
    def offset(self) -> torch.Tensor | None:
        return None if self.dmin is None or self.minima is None else self.dmin * self.minima

    def where(self, condition: torch.Tensor, other: "_Numbers") -> "_Numbers":
        """Returns these numbers where the condition is true, and the other ones elsewhere."""
        return _Numbers(torch.where(condition, self.d, other.d),
                        _where(condition, self.dmin, other.dmin),
                        torch.where(condition, self.scales, other.scales),
                        _where(condition, self.minima, other.minima))


class _Units(NamedTuple):
    """Units and offsets of groups before rounding, and their errors, all (..., groups)."""

    unit: torch.Tensor
    offset: torch.Tensor | None
    error: torch.Tensor

    def better_of(self, best: "_Units | None") -> "_Units":
        """Returns these where their error is less than that of the best so far, else the best."""
        if best is None:
            return self
        better = self.error < best.error
        return _Units(torch.where(better, self.unit, best.unit),
                      _where(better, self.offset, best.offset),
                      torch.where(better, self.error, best.error))


class _Groups:
    """The values and weights of some groups, (group, ..., groups), and sums that every step needs.

    Attributes:
        factor: power of two, (..., 1), that the values of each block were multiplied by.
        unscale: its inverse.
    """

    factor: torch.Tensor | float = 1.0
    unscale: torch.Tensor | float = 1.0

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None, grid: Grid,
                 count: int | None = None):
        def group_first(tensor: torch.Tensor) -> torch.Tensor:
            groups = tensor.unflatten(-1, (count or grid.groups, grid.group))
            return groups.movedim(-1, 0).contiguous()

        self.values = group_first(values)
        self.weights = None if weights is None else group_first(weights)
        weighted = self._weighted(self.values)
        self.squares = _sum(weighted * self.values)
        self.total = _sum(weighted)
        if self.weights is None:
            self.weight = torch.full_like(self.total, grid.group)
        else:
            self.weight = _sum(self.weights)

    def _weighted(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers if self.weights is None else numbers * self.weights

    def squared(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sum of squares of each group."""
        return _sum(self._weighted(numbers).mul(numbers))

    def sums(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns weighted sums of each group: of levels^2, of levels * values, of levels."""
        weighted = self._weighted(levels)
        return _sum(weighted * levels), _sum(weighted * self.values), _sum(weighted)
