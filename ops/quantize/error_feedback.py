"""Packing with error feedback: the rounding errors of a row are chosen so that they cancel in the
output of the layer.

Sought is the packed weight V with the least sum of |(W - V) a|^2 over the layer's inputs a, tr((W -
V) H (W - V).T) with H their second moments. Column after column is rounded, and the error of each
is taken up by the columns that come after it, as far as their inputs go along with it (GPTQ,
https://arxiv.org/abs/2210.17323; OBQ, https://arxiv.org/abs/2208.11580). The scales of a group are
searched when it is reached, from its values as they have become. Afterwards, with the scales kept,
every code in turn is set to what is best given all others (coordinate descent).

A slice of rows is worked at with its columns along the first dimension, (columns, rows), and in
chunks of columns: inside one, `ops.grid_columns` or a kernel works.
"""
import functools
from collections.abc import Callable

import torch

from .. import kernels
from ..format import Fit, Format, FormatError, powers_of_two
from ..grid_columns import Columns, choose_columns, columns_at_a_time
from ..grid_search import LARGEST_FLOAT, Search
from ..packed_layout import packed_tensor
from ..packed_tensor import PackedTensor
from .damped_hessian import DampedHessian, damping_for, rows_at_a_time
from .second_moments import SecondMoments

# First scales tried for a block and then for each of its groups, and how often the best is
# improved.
TRIES, ROUNDS = 7, 1
SWEEPS = 2


def pack_with_feedback(weight: torch.Tensor, packed_format: type[Format], moments: SecondMoments,
                       sweeps: int = SWEEPS,
                       damping: tuple[float, float] | None = None) -> PackedTensor:
    """A packed weight whose layer has about the least error of its output for the inputs that
    `moments` saw.

    weight: any float dtype, (N, ...), on any device, where the work is done. moments: of the (K,)
    other dimensions, flattened; of a pair, the target is `damped.Damped.target`. sweeps: of
    coordinate descent. damping: None: `damped.damping_for` this format.
    Returns the weight packed, showing float32. Beside it and the weight there are temporaries of
    `damped.SLICE_BYTES` and six times one block of the moments. Raises FormatError for shapes that
    the format's blocks do not divide and for numbers that are not finite.
    """
    grid = packed_format.grid
    matrix = weight.detach().reshape(len(weight), -1)
    rows, columns = matrix.shape
    if grid is None or columns % grid.length:
        why = f": they are not whole blocks of {grid.length}" if grid else ""
        raise FormatError(
            f"{packed_format.__name__} cannot be packed with error feedback in rows of {columns}"
            f" values{why}."
        )
    if columns != moments.columns:
        raise FormatError(
            f"The moments are of inputs with {moments.columns} columns, the weight of shape"
            f" {tuple(weight.shape)} takes {columns}.")
    search = Search(grid, weight.device)
    # Asked for once, so that a whole weight is packed by the same.
    run = kernels.find("pack_columns", weight.device, packed_format, torch.float32)
    choose = functools.partial(*((choose_columns, search) if run is None else (run, packed_format)))
    damping = damping or damping_for(packed_format, moments)
    blocks = columns // grid.length
    data = torch.empty(rows, blocks, packed_format.block_bytes, dtype=torch.uint8,
                       device=weight.device)
    scale = (
        torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
        if packed_format.scales_apart
        else None
    )
    for index, across in enumerate(moments.spans()):
        feedback = _Feedback(search, choose, DampedHessian(moments, index, weight.device, damping),
                             sweeps)
        across_blocks = slice(across.start // grid.length, across.stop // grid.length)
        for here in rows_at_a_time(rows, across.stop - across.start, weight.device):
            packed = packed_format.encode(feedback.pack(matrix[here, across]))
            if scale is not None:
                packed, scales = packed
                scale[here, across_blocks] = scales.view(here.stop - here.start, -1)
            data[here, across_blocks] = packed.view(here.stop - here.start, -1,
                                                    packed_format.block_bytes)
    return packed_tensor(packed_format, data.view(-1), weight.shape,
                         scale=None if scale is None else scale.view(-1))


class _Feedback:
    """Packs slices of rows of the k columns that share one block of moments."""

    def __init__(self, search: Search, choose: Callable[..., None], damped: DampedHessian,
                 sweeps: int):
        self.search, self.choose, self.damped, self.sweeps = search, choose, damped, sweeps
        diagonal = damped.triangle.diagonal()
        # of an error that all later columns have taken up as they can
        self.weights = diagonal.square().reciprocal()
        # what column j takes up of the error of i, in row i
        self.shares = damped.triangle / -diagonal.unsqueeze(-1)
        # what the error of i makes best at j, in column j
        self.steps = damped.moments / -damped.moments.diagonal()

    def pack(self, values: torch.Tensor) -> Fit:
        """values: (n, k), any float dtype. Returns the blocks of the rows in order."""
        values = values.float()
        wide = self.search.grid.scale_dtype == torch.float32
        # each row by itself, as in `Search`; a float16 scale has no room for what float32 cannot
        # square
        if wide:
            factor, unscale = powers_of_two(values.abs().amax(1, keepdim=True))
            values = values * factor
        target = self.damped.target(values).T.contiguous()
        if not target.isfinite().all():
            raise FormatError("The weight holds NaN or infinite values.")
        chosen = Columns.like(self.search.grid, target)
        self._choose(target.clone(), self.shares, self.weights, chosen)
        for _ in range(self.sweeps):
            # Half the slope of the loss along each column, by its curvature.
            slopes = self.steps.T @ chosen.values().sub_(target)
            self._choose(slopes, self.steps, None, chosen)
        fit = chosen.fit(self.search)
        if wide:
            fit.d = (fit.d.view(len(values), -1) * unscale).clamp_(-LARGEST_FLOAT,
                                                                   LARGEST_FLOAT).view_as(fit.d)
        return fit

    def _choose(self, values: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor | None,
                chosen: Columns):
        """`choose_columns` of any number of columns, chunk by chunk."""
        step = columns_at_a_time(self.search.grid)
        for first in range(0, len(values), step):
            last = min(len(values), first + step)
            chunk = slice(first, last)
            self.choose(values[chunk],
                        shares[chunk,
                               chunk].contiguous(), None if weights is None else weights[chunk],
                        chosen.part(first, last), TRIES, ROUNDS)
            values[last:].addmm_(shares[chunk, last:].T, values[chunk])
