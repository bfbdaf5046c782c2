"""Error feedback for rows whose scales are chosen; see `error_feedback`."""
from collections.abc import Callable

import torch

from .. import kernels
from ..quantize.damped_hessian import DampedHessian, slice_rows
from ..quantize.parallel_slices import parallel_slices
from ..quantize.row_columns import choose_codes, in_basis
from ..quantize.row_encoder import EncodedRows, RowEncoder
from ..quantize.row_source import RowSource
from ..quantize.second_moments import SecondMoments
from .error_feedback import check_columns


def with_feedback(source: RowSource, encoder: RowEncoder, searched: EncodedRows,
                  moments: SecondMoments) -> EncodedRows:
    """Chooses codes whose errors cancel in the output of a layer, and the scales of groups anew.

    Takes temporaries of `damped_hessian.SLICE_BYTES` and five times the moments.

    Args:
        source: the weight.
        encoder: of its format.
        searched: its rows.
        moments: of the inputs.

    Returns:
        Rows with other codes and scales, which share the memory of the numbers of rows.

    Raises:
        FormatError: the moments are of another number of inputs, or not finite.
    """
    check_columns(source.shape, moments)
    moments = in_basis(moments, encoder)
    spans, device = moments.spans(), source.device
    blocks: list[DampedHessian | None] = [None] * len(spans)

    def damp(index: int):
        blocks[index] = DampedHessian(moments, index, device)

    parallel_slices(damp, range(len(spans)), device)
    # looked up once, so that the same kernel packs the whole weight
    choosers: dict[torch.dtype, Callable] = {}
    result = EncodedRows(torch.empty_like(searched.codes), searched.scale.clone(),
                         searched.row_scale)
    for read in slice_rows(source.shape[0], source.columns, device):
        rows, encoded = source.read(read.start, read.stop), result.rows(read)
        if rows.dtype not in choosers:
            choosers[rows.dtype] = kernels.find("pack_row_columns", device, encoder.format,
                                                rows.dtype) or choose_codes
        step = len(rows) if device.type != "cpu" else -(-len(rows) // torch.get_num_threads())

        def choose(start: int, rows=rows, encoded=encoded, step=step):
            chosen = slice(start, start + step)
            for span, damped in zip(spans, blocks):
                choosers[rows.dtype](encoder, rows[chosen], encoded.rows(chosen), span, damped)

        parallel_slices(choose, range(0, len(rows), step), device)
    return result
