"""Packs a weight with error feedback: rounding errors are chosen to cancel in the layer's output.

The packed weight V minimises the sum of |(W - V) a|^2 over the layer's inputs a, which is
tr((W - V) H (W - V).T) with their second moments H. The columns are rounded one after the other,
and the later columns compensate each error as far as their inputs correlate (GPTQ,
https://arxiv.org/abs/2210.17323; OBQ, https://arxiv.org/abs/2208.11580). The scales of a group are
searched when its first column is reached, from the compensated values. Then the scales are kept,
and every code in turn is set to the best one given all others (coordinate descent).

Slices of rows are transposed to (columns, rows) and processed by `grid_error_feedback` or a kernel.
"""
import functools
import math
from collections.abc import Callable

import torch

from .. import kernels
from ..formats.base import Fit, Format, FormatError, powers_of_two
from ..quantize.column_order import feed_back
from ..quantize.damped_hessian import DampedHessian, damping_for, slice_rows
from ..quantize.grid_error_feedback import Columns, choose_columns, columns_at_a_time
from ..quantize.grid_search import LARGEST_FLOAT, Search
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_layout import packed_tensor
from ..tensor.packed_tensor import PackedTensor

# Scales tried for a block and then for each of its groups, and how often the best one is refined.
TRIES, ROUNDS = 7, 1


def pack_with_feedback(weight: torch.Tensor, packed_format: Format,
                       moments: SecondMoments) -> PackedTensor:
    """Packs a weight so that the error of its layer's output is about the least for some inputs.

    Takes temporaries of `damped_hessian.SLICE_BYTES` and six times one block of the moments.

    Args:
        weight: (N, ...) of any float dtype, on the device where the work is done.
        packed_format: A format with a grid.
        moments: Of the inputs, which match the weight's other dimensions, flattened to (K,).

    Returns:
        The packed weight, which shows as float32.

    Raises:
        FormatError: The blocks do not divide the shape, or a number is not finite.
    """
    grid = packed_format.grid
    matrix = weight.detach().reshape(len(weight), -1)
    rows, columns = matrix.shape
    if grid is None or columns % grid.length:
        reason = f": they are not whole blocks of {grid.length}" if grid else ""
        raise FormatError(
            f"{packed_format.name} cannot be packed with error feedback in rows of {columns}"
            f" values{reason}."
        )
    check_columns(weight.shape, moments)
    search = Search(grid, weight.device)
    # looked up once, so that the same kernel packs the whole weight
    kernel = kernels.find("pack_columns", weight.device, packed_format, torch.float32)
    if kernel is None:
        choose = functools.partial(choose_columns, search)
    else:
        choose = functools.partial(kernel, packed_format)
    damping = damping_for(packed_format)
    blocks = columns // grid.length
    data = torch.empty(rows, blocks, packed_format.block_bytes, dtype=torch.uint8,
                       device=weight.device)
    scale = (
        torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
        if packed_format.qparams
        else None
    )
    for index, span in enumerate(moments.spans()):
        damped = DampedHessian(moments, index, weight.device, damping)
        feedback = _Feedback(search, choose, damped)
        span_blocks = slice(span.start // grid.length, span.stop // grid.length)
        for row_slice in slice_rows(rows, span.stop - span.start, weight.device):
            count = row_slice.stop - row_slice.start
            packed = packed_format.encode(feedback.pack(matrix[row_slice, span]))
            if scale is not None:
                packed, scales = packed
                scale[row_slice, span_blocks] = scales.view(count, -1)
            data[row_slice, span_blocks] = packed.view(count, -1, packed_format.block_bytes)
    return packed_tensor(packed_format, data.view(-1), weight.shape,
                         scale=None if scale is None else scale.view(-1))


def check_columns(shape: tuple[int, ...], moments: SecondMoments):
    """Raises FormatError where moments are of another number of inputs than a weight takes."""
    columns = math.prod(shape[1:])
    if columns != moments.columns:
        raise FormatError(
            f"The moments are of inputs with {moments.columns} columns, the weight of shape"
            f" {tuple(shape)} takes {columns}.")


class _Feedback:
    """Packs slices of rows of the k columns that share one block of moments."""

    def __init__(self, search: Search, choose: Callable[..., None], damped: DampedHessian):
        self.search = search
        self.choose = choose
        self.damped = damped

    def pack(self, values: torch.Tensor) -> Fit:
        """Returns the blocks, in order, of rows of values, (n, k) of any float dtype."""
        values = values.float()
        # Each row is scaled by itself, as in `Search`. A float16 scale reaches no value whose
        # square float32 does not have.
        unscale = None
        if self.search.grid.scale_dtype == torch.float32:
            factor, unscale = powers_of_two(values.abs().amax(1, keepdim=True))
            values = values * factor
        target = values.T.contiguous()
        if not target.isfinite().all():
            raise FormatError("The weight holds NaN or infinite values.")
        chosen = Columns.like(self.search.grid, target)

        def choose(values: torch.Tensor, shares: torch.Tensor, columns: slice, is_first: bool):
            self.choose(values, shares, self.damped.weights[columns] if is_first else None,
                        chosen.part(columns.start, columns.stop), TRIES, ROUNDS)

        feed_back(choose, chosen.values, target, self.damped, columns_at_a_time(self.search.grid))
        fit = chosen.fit(self.search)
        if unscale is not None:
            d = fit.d.view(len(values), -1) * unscale
            fit.d = d.clamp_(-LARGEST_FLOAT, LARGEST_FLOAT).view_as(fit.d)
        return fit
