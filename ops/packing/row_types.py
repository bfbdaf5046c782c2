"""ComfyUI's own types that weights are packed to: codes of rows, and scales in other tensors.

For each group of columns that shares a scale several scales are tried, and the one of least error
is kept. The first one just holds the largest value of the group, as the scales of ComfyUI's own
conversion do (comfy-kitchen 0.2.26 `backends/eager/quantization.py`).
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import kernels
from ..formats.base import FORMATS, Format, FormatError
from ..formats.comfyui import (
    F8_E4M3,
    INT4_CONVROT,
    INT8_CONVROT,
    INT8_ROWS,
    MXFP8,
    MXFP8_GROUP,
    NVFP4_GROUP,
    NVFP4_ROWS,
    W4A8,
)
from ..formats.row_layout import FAMILIES, RowFamily, RowFormat
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

ROTATIONS = (256, 64, 16)  # columns, the first that divide a row


@dataclass(frozen=True)
class RowType:
    """A type of ComfyUI's own that weights are packed to.

    Attributes:
        name: ComfyUI's word for it.
        family: of its formats.
        shrinks: the scales tried, as shares of the one that just holds the largest value of a
            group.
        multiple: of which rows and columns are.
        columns: of which columns are.
        rotates: whether groups of `ROTATIONS` columns are rotated; those that none divides are not.
        is_per_tensor: whether one number, float32, is the weight's.
    """
    name: str
    family: RowFamily
    shrinks: tuple[float, ...]
    multiple: int = 1
    columns: int = 1
    rotates: bool = False
    is_per_tensor: bool = False

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a weight of a shape can be packed: (N, K) of whole groups."""
        if (len(shape) != 2 or 0 in shape or any(size % self.multiple for size in shape)
                or shape[1] % self.columns):
            return False
        return not self.rotates or self.family is INT8_CONVROT or bool(_rotation(shape[1]))

    def format_of(self, shape: tuple[int, ...]) -> RowFormat:
        """Returns the format of a weight of a shape that it takes."""
        rotation = _rotation(shape[1]) if self.rotates else 0
        if self.rotates and not rotation:
            return INT8_ROWS.of_columns(shape[1])
        return self.family.of_columns(shape[1], *((rotation,) if rotation else ()))

    def bits_per_value(self, shape: tuple[int, ...]) -> float:
        """Returns the bits of a value of a weight of a shape that it takes, scales included."""
        packed_format = self.format_of(shape)
        return 8 * (packed_format.block_bytes + packed_format.qparam_bytes()) / shape[1]


def format_of(type_name: str, shape: tuple[int, ...]) -> Format:
    """Returns the format of a weight of a shape in a type: one of `FORMATS` or of `ROW_TYPES`."""
    return (ROW_TYPES[type_name].format_of(shape) if type_name in ROW_TYPES
            else FORMATS[type_name])


def _rotation(columns: int) -> int:
    return next((size for size in ROTATIONS if columns % size == 0), 0)


# A larger scale than needed can be better where the largest levels are far apart.
OF_FOUR_BITS = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.125, 1.25, 1.375, 1.5)
# So close that each e4m3 between the ends is among them: 0.07 dB, and more would gain nothing.
OF_LEVELS = (1, *(share / 100 for share in range(60, 100, 5)),
             *(share / 100 for share in range(106, 160, 6)), 1.6)
# One scale for a row: of normally distributed values the best one holds two thirds of the largest.
OF_ROWS_OF_FOUR_BITS = (1, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66, 0.62, 0.58, 0.54)
ROW_TYPES = {row_type.name: row_type for row_type in (
    RowType("int8_convrot", INT8_CONVROT, (1, 0.95, 0.9), rotates=True),
    # the error of float8 hardly depends on the scale: by 0.04 dB at most on the demo's matrices
    RowType("float8_e4m3fn", F8_E4M3, (1,), is_per_tensor=True),
    RowType("mxfp8", MXFP8, (1, 0.5), MXFP8_GROUP),
    RowType("nvfp4", NVFP4_ROWS, OF_FOUR_BITS, NVFP4_GROUP, is_per_tensor=True),
    RowType("asym_w4a8_int8", W4A8, OF_LEVELS, 16, rotates=True),
    RowType("convrot_w4a4", INT4_CONVROT, OF_ROWS_OF_FOUR_BITS, columns=64, rotates=True),
)}


@torch.no_grad()
def pack_to_type(weight: torch.Tensor | RowSource, row_type: RowType,
                 moments: SecondMoments | None = None, is_plain: bool = False) -> PackedTensor:
    """Packs a whole weight into a type of ComfyUI's own, on the weight's device.

    Besides the weight and the result it takes temporaries of a few megabytes; with moments, those
    of `with_feedback` and a second result.

    Args:
        weight: (N, K) of any float dtype, which the type takes, or a source of its rows.
        row_type: one of `ROW_TYPES`.
        moments: Of the layer's inputs. The weight is packed with error feedback too, and that is
            kept if it gives a smaller output error for the tokens held out.
        is_plain: Whether every scale just holds the largest value of its group, as in a plain
            conversion.

    Returns:
        The packed weight, which shows as float32.

    Raises:
        TooLargeError: A value is too large for the format.
        FormatError: A value is not finite, the type does not take the shape, or the moments are of
            another number of inputs.
    """
    source = RowSource.of(weight)
    if not row_type.takes(source.shape):
        raise FormatError(f"{row_type.name} does not hold a weight of shape {source.shape}.")
    packed_format = row_type.format_of(source.shape)
    encoder = RowEncoder(packed_format, row_type.shrinks[:1] if is_plain else row_type.shrinks)
    encode = _Encode(encoder)
    if row_type.is_per_tensor:
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
