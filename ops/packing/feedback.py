"""Packing with error feedback: the rounding errors of a row are chosen so that they cancel in the output of the layer.

Sought is the packed weight V with the least sum of |(W - V) a|^2 over the layer's inputs a, tr((W - V) H (W - V).T) with H
their second moments. Column after column is rounded, and the error of each is taken up by the columns that come after it, as
far as their inputs go along with it (GPTQ, https://arxiv.org/abs/2210.17323; OBQ, https://arxiv.org/abs/2208.11580). The
scales of a group are searched when it is reached, from its values as they have become. Afterwards, with the scales kept, every
code in turn is set to what is best given all others (coordinate descent).

A slice of rows is worked at with its columns along the first dimension, (columns, rows), so that each step is one operation on
contiguous memory.
"""
import torch

from ..format import Fit, Format, FormatError, inverse
from ..grid_search import Search
from ..packed import PackedTensor
from ..tensor import packed_tensor
from .damped import Damped, rows_at_a_time
from .moments import Moments

# Columns whose errors are taken up by all later ones at once.
CHUNK = 256
# First scales tried for a block and then for each of its groups, and how often the best is improved.
TRIES, ROUNDS = 7, 1
SWEEPS = 2


def pack_with_feedback(weight: torch.Tensor, packed_format: type[Format], moments: Moments, sweeps: int = SWEEPS,
                       damping: float | None = None) -> PackedTensor:
    """A packed weight whose layer has about the least error of its output for the inputs that `moments` saw.

    weight: any float dtype, (N, ...), on any device, where the work is done. moments: of the (K,) other dimensions, flattened;
    of a pair, the target is `damped.corrected_target`. sweeps: of coordinate descent. damping: see `Damped`.
    Returns the weight packed, showing float32. Beside it and the weight there are temporaries of `damped.SLICE_BYTES` and six
    times one block of the moments. Raises FormatError for shapes that the format's blocks do not divide and for numbers that
    are not finite.
    """
    grid = packed_format.grid
    matrix = weight.detach().reshape(len(weight), -1)
    rows, columns = matrix.shape
    if grid is None or columns % grid.length:
        why = f": they are not whole blocks of {grid.length}" if grid else ""
        raise FormatError(f"{packed_format.__name__} cannot be packed with error feedback in rows of {columns} values{why}.")
    if columns != moments.columns:
        raise FormatError(f"The moments are of inputs with {moments.columns} columns, the weight of shape"
                          f" {tuple(weight.shape)} takes {columns}.")
    search = Search(grid, weight.device)
    blocks = columns // grid.length
    data = torch.empty(rows, blocks, packed_format.block_bytes, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, blocks, device=weight.device) if packed_format.scales_apart else None
    for index, across in enumerate(moments.spans()):
        feedback = _Feedback(search, Damped(moments, index, weight.device, damping), sweeps)
        across_blocks = slice(across.start // grid.length, across.stop // grid.length)
        for here in rows_at_a_time(rows, across.stop - across.start, weight.device):
            packed = packed_format.encode(feedback.pack(matrix[here, across]))
            if scale is not None:
                packed, scales = packed
                scale[here, across_blocks] = scales.view(here.stop - here.start, -1)
            data[here, across_blocks] = packed.view(here.stop - here.start, -1, packed_format.block_bytes)
    return packed_tensor(packed_format, data.view(-1), weight.shape, scale=None if scale is None else scale.view(-1))


class _Feedback:
    """Packs slices of rows of the k columns that share one block of moments."""

    def __init__(self, search: Search, damped: Damped, sweeps: int):
        self.search, self.grid, self.damped, self.sweeps = search, search.grid, damped, sweeps
        diagonal = damped.triangle.diagonal()
        self.weights = diagonal.square().reciprocal()  # of an error that all later columns have taken up as they can
        self.shares = damped.triangle / -diagonal.unsqueeze(-1)  # what column j takes up of the error of i, in row i
        self.steps = damped.moments / -damped.moments.diagonal()  # what the error of i makes best at j, in column j

    def pack(self, values: torch.Tensor) -> Fit:
        """values: (n, k), any float dtype. Returns the blocks of the rows in order."""
        target = self.damped.target(values.float()).T.contiguous()
        if not target.isfinite().all():
            raise FormatError("The weight holds NaN or infinite values.")
        state = _State(self.grid, target)
        self._round(state, target.clone())
        for _ in range(self.sweeps):
            self._sweep(state, target)
        return state.fit(self.search)

    def _round(self, state: "_State", values: torch.Tensor):
        """Rounds column after column of `values`, (k, n), which is overwritten by what they have taken up."""
        grid = self.grid
        for start in range(0, len(values), CHUNK):
            chunk = values[start:start + CHUNK]
            shares = self.shares[start:start + CHUNK]
            errors = torch.empty_like(chunk)
            for first in range(0, len(chunk), grid.group):
                group = slice(first, first + grid.group)
                self._choose_scales(state, chunk, start, first)
                rounded = state.rounder(self.search, start + first)
                for column in range(group.start, group.stop):
                    if column > first:
                        chunk[column].addmv_(errors[first:column].T, shares[first:column, start + column])
                    state.levels[start + column], value = rounded(chunk[column])
                    torch.sub(chunk[column], value, out=errors[column])
                chunk[group.stop:].addmm_(shares[group, start + group.stop:start + len(chunk)].T, errors[group])
            values[start + len(chunk):].addmm_(shares[:, start + len(chunk):].T, errors)

    def _choose_scales(self, state: "_State", chunk: torch.Tensor, start: int, first: int):
        """The scales of the group that begins at `first` of a chunk, and at the first of a block its super-scales."""
        length, group = self.grid.length, self.grid.group
        weights = self.weights[start:].unsqueeze(0)
        if first % length == 0:
            fit = self.search.fit(chunk[first:first + length].T, weights[:, first:first + length], TRIES, ROUNDS, 0)
            state.set_supers((start + first) // length, fit)
            return
        d, dmin = state.supers((start + first) // length)
        found = self.search.fit_group(chunk[first:first + group].T, weights[:, first:first + group], d, dmin, TRIES, ROUNDS)
        state.set_scales((start + first) // group, *found)

    def _sweep(self, state: "_State", target: torch.Tensor):
        """Sets each code to the best one, the others given."""
        slopes = self.steps.T @ state.values().sub_(target)  # half the slope of the loss along each column, by its curvature
        for start in range(0, len(target), CHUNK):
            chunk = slopes[start:start + CHUNK]
            steps = self.steps[start:start + CHUNK]
            changes = torch.empty_like(chunk)
            for first in range(0, len(chunk), self.grid.group):
                group = slice(first, first + self.grid.group)
                rounded = state.rounder(self.search, start + first)
                for column in range(group.start, group.stop):
                    if column > first:
                        chunk[column].addmv_(changes[first:column].T, steps[first:column, start + column])
                    before = rounded.value(state.levels[start + column])
                    state.levels[start + column], value = rounded(before + chunk[column])
                    torch.sub(value, before, out=changes[column])
                chunk[group.stop:].addmm_(steps[group, start + group.stop:start + len(chunk)].T, changes[group])
            slopes[start + len(chunk):].addmm_(steps[:, start + len(chunk):].T, changes)


class _State:
    """What is chosen so far for n rows of k columns: the numbers of a `Fit`, the columns along the first dimension."""

    def __init__(self, grid, target: torch.Tensor):
        self.grid = grid
        columns, rows = target.shape
        blocks, groups = columns // grid.length, columns // grid.group
        self.levels = torch.zeros_like(target)
        self.d, self.scales = target.new_zeros(blocks, rows), target.new_ones(groups, rows)
        self.dmin = target.new_zeros(blocks, rows) if grid.minimum else None
        self.minima = target.new_ones(groups, rows) if grid.minimum else None

    def set_supers(self, block: int, fit: Fit):
        """The super-scales of a block and the scales of its first group."""
        self.d[block] = fit.d[:, 0]
        if self.dmin is not None:
            self.dmin[block] = fit.dmin[:, 0]
        self.set_scales(block * self.grid.groups, fit.scales, fit.minima)

    def set_scales(self, group: int, scales: torch.Tensor, minima: torch.Tensor | None):
        self.scales[group] = scales[:, 0]
        if minima is not None:
            self.minima[group] = minima[:, 0]

    def supers(self, block: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.d[block].unsqueeze(-1), None if self.dmin is None else self.dmin[block].unsqueeze(-1)

    def rounder(self, search: Search, column: int) -> "_Rounder":
        block, group = column // self.grid.length, column // self.grid.group
        offset = None if self.dmin is None else self.dmin[block] * self.minima[group]
        return _Rounder(search, self.d[block] * self.scales[group], offset)

    def values(self) -> torch.Tensor:
        """What the codes stand for, (k, n)."""
        groups = self.levels.unflatten(0, (-1, self.grid.groups, self.grid.group))
        unit = self.d.unsqueeze(1) * self.scales.unflatten(0, (-1, self.grid.groups))
        values = groups * unit.unsqueeze(2)
        if self.dmin is not None:
            values -= (self.dmin.unsqueeze(1) * self.minima.unflatten(0, (-1, self.grid.groups))).unsqueeze(2)
        return values.flatten(0, 2)

    def fit(self, search: Search) -> Fit:
        def by_rows(part):
            if part is None:
                return None
            turned = part.unflatten(0, (len(self.d), -1)).movedim(-1, 0)
            return turned.clone(memory_format=torch.contiguous_format).flatten(0, 1)

        return Fit(by_rows(search.codes(self.levels)), *map(by_rows, (self.d, self.scales, self.dmin, self.minima)))


class _Rounder:
    """Rounds columns of one group of n rows: rounder((n,)) -> (levels, values), each (n,)."""

    def __init__(self, search: Search, unit: torch.Tensor, offset: torch.Tensor | None):
        self._nearest, self._unit, self._inverse = search.nearest_levels, unit, inverse(unit)
        self._offset = None if offset is None else -offset
        self._shift = None if offset is None else offset * self._inverse

    def __call__(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = column * self._inverse if self._shift is None else torch.addcmul(self._shift, column, self._inverse)
        levels = self._nearest(scaled)
        return levels, self.value(levels)

    def value(self, levels: torch.Tensor) -> torch.Tensor:
        return levels * self._unit if self._offset is None else torch.addcmul(self._offset, levels, self._unit)
