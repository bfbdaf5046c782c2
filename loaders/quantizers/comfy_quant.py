"""ComfyUI's own quantised formats: several tensors in the file, one packed tensor.

A layer that `pack_parts` reads, or `layer_parts` makes, has the parts of its format, a record of
`comfy_quant_formats`, `comfy_quant`, settings in JSON, and may have `pre_quant_scale` (K,), factors
of its input.
"""
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...ops.formats.comfy_quant import SMOOTHED
from ...ops.tensor.packed_layout import is_packed, packed_tensor, packed_tensors
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import describe
from .base import HeaderOf, Quantizer
from .comfy_quant_formats import (
    ALWAYS_1,
    COMFYUI_FORMATS,
    FORMAT,
    IGNORED,
    SCALE,
    SCALE_2,
    SMOOTHING,
    Settings,
    Stored,
    Written,
    is_rotated,
    known_format,
)
from .comfy_quant_marks import marked_layers
from .parts import GET_OTHER_CONVERSION, PartError, bind_sizes

LEAST_OF_EXPERTS = 32  # bytes of a row of experts; the kernel of a convolution has fewer
# name of a family -> the format that its packed tensors are written in
WRITTEN_IN = {family.name: record for record in COMFYUI_FORMATS.values()
              for family in record.written}


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers that are marked as ComfyUI's."""
    yield from marked_layers(metadata, names)


def pack_parts(settings: Settings, parts: Mapping[str, torch.Tensor]) -> PackedTensor | None:
    """Makes one packed tensor of the parts of a weight.

    Args:
        settings: of the layer's `comfy_quant`, which `check_settings` takes.
        parts: the last parts of their names -> the layer's tensors.

    Returns:
        A packed tensor of (N, K), padded as in the file, or of (N, C, ...), the kernel of a
        convolution; None for a format, or with a part, that is not read here.

    Raises:
        PartError: the parts do not belong together.
    """
    known, codes = known_format(settings), parts["weight"]
    if known is None:
        return None
    second = parts.get(SCALE_2)
    if second is not None and known.parts.get(SCALE_2) == ALWAYS_1 and bool(
            (second.float() != 1).any()):
        raise PartError(f"it has {SCALE_2}, which {known.name} has not")
    if known.of_blocks and has_block_scales(codes, parts.get(SCALE)) and not is_rotated(settings):
        known = COMFYUI_FORMATS[known.of_blocks]
        settings = {**settings, FORMAT: known.name}
    parts = {name: tensor for name, tensor in parts.items() if name not in IGNORED}
    if is_kernel(settings, codes):
        if known.read_kernel is None:
            formats = (each.name for each in COMFYUI_FORMATS.values() if each.read_kernel)
            raise PartError(f"it is {describe(codes)}, the kernel of a convolution, expected one of"
                            f" {', '.join(formats)}", GET_OTHER_CONVERSION)
        expected = {**known.parts, "weight": replace(known.parts["weight"], shape="(N, C, T...)")}
        return known.read_kernel(Stored(known, settings, parts, bind_sizes(parts, expected)))
    expected = (codes.ndim == 4 and known.in_tiles) or known.parts
    names = {each: name for name, part in expected.items() for each in part.other_names}
    parts = {names.get(name, name): tensor for name, tensor in parts.items()}
    smoothing = parts.pop(SMOOTHING, None)
    if set(parts) - set(expected):
        return None
    packed = known.read(Stored(known, settings, parts, bind_sizes(parts, expected)))
    return packed if packed is None or smoothing is None else smooth(packed, smoothing)


def nvfp4_scale_shapes(codes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns the shapes that the scales of a matrix in nvfp4 may have: in rows, and in tiles of
    128 x 4, in the order of cuBLAS. Empty where its bytes (N, K / 2) are none of nvfp4."""
    if len(codes) != 2 or codes[1] % 8:
        return ()
    rows, blocks = codes[0], codes[1] // 8
    return (rows, blocks), (-(-rows // 128) * 128, -(-blocks // 4) * 4)


def has_block_scales(codes: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Returns whether each row of a matrix has several scales, those of blocks of columns."""
    return (scale is not None and codes.ndim == 2 and scale.ndim in (2, 3)
            and len(scale) == len(codes) and scale.shape[1] > 1)


def is_kernel(settings: Settings, codes: torch.Tensor) -> bool:
    """Returns whether a weight is the kernel of a convolution.

    Others of more than two dimensions are codes in tiles, and those of banks of experts (E, N, W).
    """
    known = known_format(settings)
    may_be_tiled = known is not None and bool(known.in_tiles)
    return codes.ndim > 2 and not may_be_tiled and not has_rows_of_experts(codes)


def has_rows_of_experts(codes: torch.Tensor) -> bool:
    """Returns whether codes are those of stacked experts by their shape alone, (E, N, W)."""
    return codes.ndim == 3 and codes.shape[2] >= LEAST_OF_EXPERTS


def smooth(packed: PackedTensor, factors: torch.Tensor) -> PackedTensor:
    """Returns a weight of rows with a factor for each column, which its layer has for its input.

    Raises:
        PartError: there is not one for each column, or the format takes none.
    """
    packed_format: Any = packed.params.format
    columns = packed.shape[1]
    family = SMOOTHED.get(getattr(packed_format, "family", ""))
    missing = columns - factors.numel()  # of the columns that fill a row up
    if family is None or packed.ndim > 2 or not 0 <= missing < packed_format.padding:
        raise PartError(f"its {SMOOTHING} is {describe(factors)}")
    factors = torch.nn.functional.pad(factors.float().flatten(), (0, missing), value=1)
    data, *sides = [*packed_tensors(packed), factors]
    return packed_tensor(family.of_columns(columns, *packed_format.sizes), data, packed.shape,
                         packed.dtype, *sides)


def shifted_bias(weight: PackedTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the bias of a layer with what a shift of its input adds.

    Without such a shift it returns `bias`.

    Args:
        weight: of `pack_parts`.
        bias: (N,), or None.

    Raises:
        PartError: the layer has no bias, or one of another length.
    """
    shift = weight.params.input_shift
    if shift is None:
        return bias
    if bias is None:
        raise PartError("act_unsigned needs a bias")
    if bias.shape != shift.shape or not bias.is_floating_point():
        raise PartError(f"its bias is {describe(bias)}, expected {len(shift)} numbers")
    return bias.float() + shift


def row_type_of(weight: torch.Tensor) -> str | None:
    """Returns the key of ROW_TYPES whose files can hold a weight bit for bit, None for none."""
    if not is_packed(weight) or weight.ndim != 2:
        return None
    packed_format: Any = weight.params.format
    written = WRITTEN_IN.get(getattr(packed_format, "family", ""))
    if written is None:
        return None
    if written.is_of_one_number:
        layout = packed_format.layout
        numbers = weight.params.row_scale if layout.row_scale else weight.params.scale
        is_one = layout.row_scale or layout.groups == 1
        if not is_one or numbers is None or not bool((numbers == numbers[0]).all()):
            return None
    return written.row_type or written.name


def layer_parts(weight: PackedTensor) -> Written:
    """Returns what a file has of a layer's weight: the inverse of `pack_parts`.

    They are what ComfyUI's own layers save, but scales of mxfp8 are bytes, as in published files:
    older versions of safetensors have no such dtype. Rows are filled up with zeros to the multiple
    that the format needs.

    Args:
        weight: (N, K) of a row type, as `row_type_of` says; its tensors may be on the meta device.

    Returns:
        The settings of the layer's `comfy_quant`, and the last parts of names -> tensors, which may
        share the weight's memory.
    """
    packed_format: Any = weight.params.format
    written = WRITTEN_IN[packed_format.family]
    assert written.write is not None
    codes, *sides = packed_tensors(weight)
    tensors = {qparam.name: side for qparam, side in zip(packed_format.qparams, sides)}
    missing = -len(weight) % packed_format.padding
    codes = torch.nn.functional.pad(codes.view(len(weight), -1), (0, 0, 0, missing))
    settings, parts = written.write(packed_format.layout, tensors | {"weight": codes})
    dtype = written.parts["weight"].dtypes[0]
    return {FORMAT: written.name, **settings}, {"weight": codes.view(dtype), **parts}


QUANTIZER = Quantizer(name="ComfyUI's own formats", find=find, in_file=False, layouts={
    record.name: record.parts for record in COMFYUI_FORMATS.values()})
