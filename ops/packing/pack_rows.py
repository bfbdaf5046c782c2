"""Packs a weight into ComfyUI's own formats: codes of rows, and scales in other tensors.

For each group of columns that shares a scale several scales are tried, and the one of least error
is kept. The first one just holds the largest value of the group, as the scales of ComfyUI's own
conversion do (comfy-kitchen 0.2.26 `backends/eager/quantization.py`).
"""
from collections.abc import Callable

import torch

from .. import kernels
from ..formats.row_layout import FAMILIES, RowFormat
from ..quantize.finite_peak import finite_peak
from ..quantize.parallel_slices import parallel_slices
from ..quantize.row_encoder import EncodedRows, RowEncoder
from ..quantize.row_source import RowSource
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_layout import packed_rows
from ..tensor.packed_tensor import PackedTensor
from .method_choice import pick_lower_error
from .pack_tensor import CPU_SLICE_VALUES, DEVICE_SLICE_VALUES
from .row_feedback import with_feedback


@torch.no_grad()
def pack_rows(weight: torch.Tensor | RowSource, packed_format: RowFormat,
              shrinks: tuple[float, ...], is_per_tensor: bool = False,
              moments: SecondMoments | None = None) -> PackedTensor:
    """Packs a whole weight, (N, K), into a format of rows of K columns; see `PackType.pack`.

    Besides the weight and the result it takes temporaries of a few megabytes; with moments, those
    of `with_feedback` and a second result.

    Args:
        shrinks: the scales tried, as shares of the one that just holds the largest value of a
            group.
        is_per_tensor: whether one number, float32, is the weight's.
    """
    source = RowSource.of(weight)
    encoder = RowEncoder(packed_format, shrinks)
    encode = _Encode(encoder)
    if is_per_tensor:
        encoder.choose_scale_of_tensor(_peak(source))
    searched = EncodedRows.empty(encoder.layout, source.shape[0], source.device)
    for chosen, rows in source.slices():
        encode(rows, searched.rows(chosen))
    by_search = _packed(searched, packed_format)
    if moments is None:
        return by_search
    by_feedback = _packed(with_feedback(source, encoder, searched, moments), packed_format)
    return pick_lower_error(source, [by_feedback, by_search], moments)


def _packed(rows: EncodedRows, packed_format: RowFormat) -> PackedTensor:
    """Returns encoded rows as a weight, which shares memory."""
    tensors = {"scale": rows.scale}
    if rows.row_scale is not None:
        tensors["row_scale"] = rows.row_scale
    return packed_rows(FAMILIES[packed_format.family], rows.codes,
                       (len(rows.codes), packed_format.layout.columns), packed_format.sizes,
                       **tensors)


class _Encode:
    """Does what `RowEncoder.encode` does, by a kernel where there is one, else in parallel."""

    def __init__(self, encoder: RowEncoder):
        self._encoder = encoder
        self._kernels: dict[torch.dtype, Callable | None] = {}  # each looked up once for a weight

    def __call__(self, rows: torch.Tensor, out: EncodedRows):
        device, dtype = rows.device, rows.dtype
        if dtype not in self._kernels:
            self._kernels[dtype] = kernels.find("pack_rows", device, self._encoder.format, dtype)
        kernel = self._kernels[dtype]
        if kernel is not None:
            kernel(self._encoder, rows.contiguous(), out)
            return
        step = _rows_at_a_time(rows)

        def encode_slice(start: int):
            chosen = slice(start, start + step)
            self._encoder.encode(rows[chosen], out.rows(chosen))

        parallel_slices(encode_slice, range(0, len(rows), step), device)


def _rows_at_a_time(rows: torch.Tensor) -> int:
    """Returns how many rows a thread handles at a time."""
    limit = CPU_SLICE_VALUES if rows.device.type == "cpu" else DEVICE_SLICE_VALUES
    return max(1, limit // rows.shape[1])


def _peak(source: RowSource) -> float:
    """Returns the largest magnitude of a weight."""
    peaks = []
    for _, rows in source.slices():
        step = _rows_at_a_time(rows)
        parallel_slices(
            lambda start, rows=rows, step=step: peaks.append(finite_peak(rows[start:start + step])),
            range(0, len(rows), step), rows.device)
    return max(peaks)
