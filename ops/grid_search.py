"""The search of the codes and scales that represent given values best, one for every format with a
`Grid`.

Sought are the numbers of a `Fit` with the least sum of weight * (value - represented)**2 over a
block. For each group several scales are tried: each gives codes, and the codes the scale (and
offset) of least squares. The scales are then rounded as the format stores them, under super-scales
that all groups of a block share, and integers, codes and super-scales are improved in turns. All
arithmetic is float32, block by block, so that packing a part of a weight gives a part of the packed
weight. The values of a block are multiplied by a power of two first, which is exact: their squares
and products stay in float32's range whatever their size, and no bit comes out otherwise where they
would have stayed there without it.

Inside, the values of a group lie along the first dimension, (group, ..., groups): sums over it are
sums of whole vectors. Here a group has a `unit` (d * scale) and an `offset` (dmin * minimum): value
= unit * level - offset.
"""
import torch

from .bits import select
from .format import Fit, Grid, inverse, powers_of_two

# How far beyond or before the ends of the levels the first scales put a group's extremes: in
# levels, where these are integers, and otherwise as a part of the last level.
STRETCH_LEVELS, STRETCH_PART = (-0.9, 0.9), (-0.12, 0.24)
# Levels that are no neighbouring integers are looked up by the cell of their range that a number
# falls into. So many cells that each lies on one side of the middles of IQ4's levels, which are
# multiples of a half, and almost each with the others.
CELLS = 4800
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0
LARGEST_FLOAT = torch.finfo(torch.float32).max


class Search:
    """The search over one grid on one device."""

    def __init__(self, grid: Grid, device: torch.device):
        self.grid = grid
        self.lowest, self.highest = grid.levels[0], grid.levels[-1]
        levels = torch.tensor(grid.levels, dtype=torch.float32, device=device)
        self.cells = CELLS / (self.highest - self.lowest)
        nearest = torch.bucketize(
            (torch.arange(CELLS, dtype=torch.float32, device=device) + 0.5) / self.cells +
            self.lowest, (levels[1:] + levels[:-1]) / 2)
        self.levels_of_cells, self.codes_of_cells = levels[nearest], nearest.to(torch.uint8)

    def fit(self, values: torch.Tensor, weights: torch.Tensor | None = None, tries: int = 9,
            rounds: int = 1, sweeps: int = 1, emphasis: bool = False) -> Fit:
        """The best found for some blocks, all zeros where nothing that the format has is nearer.

        values: float32 (..., length). weights: float32, at least 0, of a shape that broadcasts to
        that of `values`; None: all equal. tries: how many first scales, rounds: how often the best
        one is improved, sweeps: how often integers and super-scales are improved in turns.
        emphasis: whether errors of large values count more, as in ggml's
        `quantize_row_q2_K_impl`: times the root of the square and the block's mean square.
        """
        factor, unscale = powers_of_two(
            torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True)))
        values = values * factor
        if emphasis:
            squares = values.square()
            large = (squares + squares.mean(-1, keepdim=True)).sqrt_()
            weights = large if weights is None else large * weights
        groups = _Groups(values, weights, self.grid)
        groups.factor, groups.unscale = factor, unscale
        state = self._first_state(groups, *self.start(groups, tries, rounds))
        error = _over_groups(self._error(groups, state))
        for _ in range(sweeps):
            integers = self._integers(groups, state)
            for tried in (integers, self._supers(groups, integers)):
                found = _over_groups(self._error(groups, tried))
                better = found < error
                error = torch.where(better, found, error)
                state = _either(better, tried, state)
        nearer = error <= _over_groups(groups.squares)
        return self._as_fit(groups, [None if part is None else part * nearer
                                     for part in state[:2]] + state[2:])

    def fit_quickly(self, values: torch.Tensor) -> Fit:
        """Blocks, one group each and without a minimum, that just reach their peaks. values:
        float32 (n, length)."""
        peak = values.abs().amax(-1, keepdim=True)
        d = self._stored(peak / self.highest)
        # rounded down far, below the usual range
        d = torch.where(peak > d * (self.highest + 0.5), d + SMALLEST_HALF, d)
        return Fit(self.codes(self.round(values, d)), d, torch.ones_like(d))

    def fit_group(self, values: torch.Tensor, weights: torch.Tensor | None, d: torch.Tensor,
                  dmin: torch.Tensor | None, tries: int = 7,
                  rounds: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The integers, scale and minimum, float32 (n, 1), of one group of n blocks whose
        super-scales are chosen.

        values: float32 (n, group). weights: float32 (1 or n, group). d, dmin: float32 (n, 1), as in
        `Fit`.
        """
        groups = _Groups(values, weights, self.grid, 1)
        scale, minimum = self._rounded(*self.start(groups, tries, rounds), d, dmin)
        _, _, scale, minimum = self._integers(groups, [d, dmin, scale, minimum])
        return scale, minimum

    def round(self, values: torch.Tensor, unit: torch.Tensor,
              offset: torch.Tensor | None = None) -> torch.Tensor:
        """The levels, float32, nearest to `values`; that of 0 where the unit is 0. Shapes that
        broadcast."""
        return self.nearest_levels((values if offset is None else values + offset) * inverse(unit))

    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        """The levels, float32, nearest to numbers in units of their scale, which are
        overwritten."""
        if self.grid.uniform:
            return scaled.round_().clamp_(self.lowest, self.highest)
        return self._by_cell(self.levels_of_cells, scaled)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes, uint8, of levels that `round` gave."""
        if self.grid.uniform:
            return (levels - self.lowest).to(torch.uint8)
        return self._by_cell(self.codes_of_cells, levels.clone())

    def _by_cell(self, table: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        cells = scaled.sub_(self.lowest).mul_(self.cells).clamp_(0, CELLS - 1).int()
        return select(table, cells.view(-1)).view(cells.shape)

    def start(self, groups: "_Groups", tries: int,
              rounds: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit and offset of each group, (..., groups), not yet rounded. The offset is None for
        grids without a minimum."""
        best = _Best()
        for unit, offset in self._first_units(groups, tries):
            best.keep(*self._least_squares(groups, self.round(groups.values, unit, offset)))
        for _ in range(rounds):
            best.keep(
                *self._least_squares(groups, self.round(groups.values, best.unit, best.offset)))
        return best.unit, best.offset

    def _first_units(self, groups: "_Groups", tries: int):
        low, high = groups.values.amin(0), groups.values.amax(0)
        reach = STRETCH_LEVELS if self.grid.uniform else STRETCH_PART
        stretches = torch.linspace(*reach, tries, dtype=torch.float32).tolist()
        if self.grid.minimum:
            if self.grid.scales:
                low = low.clamp(max=0)  # the minimum that is taken off is never negative
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
            for end in ends:
                yield peak / (end *
                              (1 +
                               (stretch / self.highest if self.grid.uniform else stretch))), None

    def _least_squares(self, groups: "_Groups", levels: torch.Tensor):
        """Unit, offset and error of each group if its values got these levels; the error is
        infinite if none is allowed."""
        squares, products, total = groups.sums(levels)
        if not self.grid.minimum:
            unit = products * inverse(squares)
            error = groups.squares - unit * products
            return (
                unit,
                None,
                error if self.grid.signed else torch.where(unit >= 0, error, torch.inf),
            )
        determinant = groups.weight * squares - total * total
        sound = determinant > 1e-6 * groups.weight * squares
        unit = (groups.weight * products - groups.total * total) * inverse(determinant)
        offset = (total * products - squares * groups.total) * inverse(determinant)
        # Where all levels are one, a constant is best; the minimum of an integer format cannot be
        # one above zero.
        constant = -groups.total * inverse(groups.weight)
        unit, offset = torch.where(sound, unit, 0), torch.where(sound, offset, constant)
        if self.grid.scales:
            through_zero = offset < 0
            unit, offset = (
                torch.where(through_zero, products * inverse(squares), unit),
                offset.clamp(min=0),
            )
        error = (groups.squares + unit * (unit * squares - 2 * products - 2 * offset * total)
                 + offset * (offset * groups.weight + 2 * groups.total))
        return unit, offset, torch.where(unit >= 0, error, torch.inf)

    def _first_state(self, groups: "_Groups", unit: torch.Tensor,
                     offset: torch.Tensor | None) -> list:
        """Super-scales, (..., 1), scale integers and minimum integers, (..., groups), of units and
        offsets."""
        if not self.grid.scales:
            ones = torch.ones_like(unit)
            if offset is None:
                return [self._stored(unit, groups), None, ones, None]
            return [self._stored(unit, groups), self._stored(offset, groups, True), ones, ones]
        lowest, highest = self.grid.scales
        if lowest < 0:
            d = self._stored(unit.gather(-1, unit.abs().argmax(-1, keepdim=True)) / lowest, groups)
        else:
            d = self._stored(unit.amax(-1, keepdim=True) / highest, groups)
        dmin = (
            None
            if offset is None
            else self._stored(offset.amax(-1, keepdim=True) / highest, groups)
        )
        return [d, dmin, *self._rounded(unit, offset, d, dmin)]

    def _stored(self, scales: torch.Tensor, groups: "_Groups | None" = None,
                to_zero: bool = False) -> torch.Tensor:
        """Scales as the format stores them. One below the range of float16 becomes its smallest
        number, unless `to_zero`.

        groups: of values that were multiplied by a power of two, as their scales then are; None:
        they were not.
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

    def _rounded(self, unit, offset, d, dmin):
        """The integers nearest to units and offsets."""
        scales = (unit * inverse(d)).round_().clamp_(*self.grid.scales)
        return scales, None if offset is None else (offset * inverse(dmin)).round_().clamp_(
            *self.grid.scales
        )

    def _error(self, groups: "_Groups", state: list) -> torch.Tensor:
        """Weighted squared error of each group, (..., groups)."""
        d, dmin, scales, minima = state
        unit, offset = d * scales, None if dmin is None else dmin * minima
        off = self.round(groups.values, unit, offset).mul_(unit)
        return groups.squared(off.sub_(groups.values if offset is None else groups.values + offset))

    def _integers(self, groups: "_Groups", state: list) -> list:
        """The state with the best integers of those at most one from its own."""
        if not self.grid.scales:
            return state
        d, dmin, scales, minima = best = state
        error = self._error(groups, state)
        for step in (-1, 0, 1):
            for other in (-1, 0, 1) if minima is not None else (0,):
                if step == other == 0:
                    continue
                tried = [d, dmin, (scales + step).clamp_(*self.grid.scales),
                         None if minima is None else (minima + other).clamp_(*self.grid.scales)]
                found = self._error(groups, tried)
                better = found < error
                error = torch.where(better, found, error)
                best = [d, dmin, *_either(better, tried[2:], best[2:])]
        return best

    def _supers(self, groups: "_Groups", state: list) -> list:
        """The state with the super-scales of least squares for its codes and integers."""
        d, dmin, scales, minima = state
        levels = self.round(groups.values, d * scales, None if dmin is None else dmin * minima)
        squares, products, total = groups.sums(levels)
        aa, ax = _over_groups(scales * scales * squares), _over_groups(scales * products)
        if dmin is None:
            new = ax * inverse(aa)
            return [
                self._stored(new if self.grid.signed else new.clamp(min=0), groups), None, scales,
                None
            ]
        ab, bb = (
            _over_groups(scales * minima * total),
            _over_groups(minima * minima * groups.weight),
        )
        bx = _over_groups(minima * groups.total)
        determinant = aa * bb - ab * ab
        new, new_min = (
            (ax * bb - ab * bx) * inverse(determinant),
            (ab * ax - aa * bx) * inverse(determinant),
        )
        sound = (determinant > 1e-6 * aa * bb) & (new > 0)
        if self.grid.scales:
            sound &= new_min >= 0
        return [
            torch.where(sound, self._stored(new, groups), d),
            torch.where(sound, self._stored(new_min, groups, True), dmin), scales, minima
        ]

    def _as_fit(self, groups: "_Groups", state: list) -> Fit:
        d, dmin, scales, minima = state
        levels = self.round(groups.values, d * scales, None if dmin is None else dmin * minima)
        codes = self.codes(levels).movedim(0, -1).contiguous().view(-1, self.grid.length)
        supers = [None if part is None else part * groups.unscale for part in (d, dmin)]
        flat = [
            None if part is None else part.reshape(len(codes), -1)
            for part in (supers[0], scales, supers[1], minima)
        ]
        return Fit(codes, *flat)


def _sum(numbers: torch.Tensor) -> torch.Tensor:
    """`numbers.sum(0)` of a power of two of them, in an order that does not depend on the other
    dimensions, as torch's does."""
    half = numbers.shape[0]
    while half > 1:
        half //= 2
        numbers = numbers[:half] + numbers[half:]
    return numbers[0]


def _over_groups(numbers: torch.Tensor) -> torch.Tensor:
    """Sums over the groups of a block, (..., 1)."""
    return _sum(numbers.movedim(-1, 0)).unsqueeze(-1)


def _either(condition: torch.Tensor, those: list, others: list) -> list:
    return [
        None if this is None else torch.where(condition, this, other)
        for this, other in zip(those, others)
    ]


class _Groups:
    """The values of some groups and their weights, (group, ..., groups), and what every step needs
    of them.

    factor, unscale: powers of two, (..., 1), that the values of each block were multiplied by, and
    their inverses.
    """

    factor = unscale = None

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None, grid: Grid,
                 count: int | None = None):
        def in_order(tensor):
            return tensor.unflatten(-1, (count or grid.groups, grid.group)).movedim(-1,
                                                                                    0).contiguous()

        self.values = in_order(values)
        self.weights = None if weights is None else in_order(weights)
        weighted = self._weighted(self.values)
        self.squares = _sum(weighted * self.values)
        self.total = _sum(weighted)
        self.weight = (
            torch.full_like(self.total, grid.group) if weights is None else _sum(self.weights)
        )

    def _weighted(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers if self.weights is None else numbers * self.weights

    def squared(self, numbers: torch.Tensor) -> torch.Tensor:
        """Weighted sum of squares of each group."""
        return _sum(self._weighted(numbers).mul(numbers))

    def sums(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weighted sums of each group: of squared levels, of levels times values, of levels."""
        weighted = self._weighted(levels)
        return _sum(weighted * levels), _sum(weighted * self.values), _sum(weighted)


class _Best:
    """The unit and offset of least error that were seen."""

    unit = offset = error = None

    def keep(self, unit: torch.Tensor, offset: torch.Tensor | None, error: torch.Tensor):
        if self.error is None:
            self.unit, self.offset, self.error = unit, offset, error
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.unit = torch.where(better, unit, self.unit)
        self.offset = None if offset is None else torch.where(better, offset, self.offset)
