"""Reads weights in ComfyUI's own quantised formats: several tensors in the file, one packed tensor.

The weights of layer `L` of (N, K) that `pack_parts` reads; each has `L.comfy_quant`, settings in
JSON:

| `format` | `L.weight` | scales |
|---|---|---|
| float8_e4m3fn, float8_e5m2, float8_e4m3fn_rowwise | fp8 (N, K) | `weight_scale` () or (N,) |
| float8_e4m3fn_blockwise, float8_e4m3fn_block3d | fp8 (N, K) | `weight_scale` (N / b, K / b) or |
| | | (N, K / b, 1) |
| mxfp8, hybrid_mxfp8 | fp8 (N, K) | `weight_scale` of 32 columns, in blocks |
| nvfp4 | 4 bits (N, K / 2) | `weight_scale` of 16 columns, in blocks; `weight_scale_2` () |
| int8_tensorwise | int8 (N, K) | `weight_scale` () or (N, 1) |
| int8_blockwise | int8 (N, K) | `weight_scale` (N / b, K / b) |
| convrot_w4a4 | 4 bits (N, K / 2) | `weight_scale` (N,) |

"In blocks" is the order of cuBLAS: pieces of 128 rows and 4 columns of scales.
Sources: comfy-kitchen 0.2.26 `tensor/*.py`, ComfyUI 0.30 `comfy/ops.py`, convert_to_quant.
"""
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ...ops.formats._rows import RowFormat
from ...ops.formats.comfy import (
    F8_E4M3,
    F8_E5M2,
    INT4_CONVROT,
    INT8_CONVROT,
    INT8_GROUPS,
    INT8_ROWS,
    MXFP8,
    NVFP4_ROWS,
)
from ...ops.packed_layout import packed_tensor
from ...ops.packed_tensor import PackedTensor

MARK = ".comfy_quant"
# key of a file's metadata that has the `comfy_quant` settings of all layers
SETTINGS = "_quantization_metadata"
SCALE, SCALE_2 = "weight_scale", "weight_scale_2"
# tensors of a layer that say nothing about the values of its weight
IGNORED = ("comfy_quant", "input_scale", "weight_scalar")
ROTATION = 256  # columns, where the settings name no other number
PIECE_ROWS, PIECE_COLUMNS = 128, 4  # of scales in blocks

Parts = dict[str, torch.Tensor]


class PartError(ValueError):
    """The parts of a weight do not belong together; the message is part of a sentence."""


def format_of(settings: Mapping[str, Any]) -> str:
    """Returns the format that a layer's settings name, "" for none; INT8-Fast's leave it out."""
    name = settings.get("format")
    if name is None and settings.get("per_row") is True:
        return "int8_tensorwise"
    return name if isinstance(name, str) else ""


def pack_parts(settings: Mapping[str, Any], parts: Mapping[str, torch.Tensor]
               ) -> PackedTensor | None:
    """Makes one packed tensor of the parts of a weight.

    Args:
        settings: of the layer's `comfy_quant`.
        parts: the last parts of their names -> the layer's tensors.

    Returns:
        A packed tensor of (N, K), padded as in the file; None for a format, or with a part, that is
        not read here.

    Raises:
        PartError: the parts do not belong together.
    """
    read = READERS.get(format_of(settings))
    parts = {name: tensor for name, tensor in parts.items() if name not in IGNORED}
    if read is None or set(parts) - {"weight", SCALE, SCALE_2}:
        return None
    weight = parts["weight"]
    if weight.ndim != 2 or weight.itemsize != 1:
        raise PartError(f"its codes are {_describe(weight)}")
    return read(settings, parts)


def _rows_of(family: type[RowFormat], settings: Mapping, parts: Parts) -> PackedTensor:
    """Reads a format with one scale a row, or one scale."""
    return _pack(family, parts, _row_scales(parts, SCALE))


def _int8(settings: Mapping, parts: Parts) -> PackedTensor:
    if _setting(settings, "convrot", False):
        return _rotated(INT8_CONVROT, settings, parts)
    return _rows_of(INT8_ROWS, settings, parts)


def _rotated(family: type[RowFormat], settings: Mapping, parts: Parts) -> PackedTensor:
    group = _setting(settings, "convrot_groupsize", ROTATION)
    try:
        group = int(group)
    except (TypeError, ValueError):
        group = 0
    columns = parts["weight"].shape[1] * 8 // family.bits
    if group < 4 or math.log(group, 4) % 1 or columns % group:
        raise PartError(f"columns are rotated in groups of {group} of {columns}")
    return _pack(family, parts, _row_scales(parts, SCALE), group=group)


def _blocks_of(family: type[RowFormat], settings: Mapping, parts: Parts) -> PackedTensor:
    """Reads a format whose scales belong to blocks of rows and columns, or of columns."""
    rows, columns = parts["weight"].shape
    scale = _part(parts, SCALE).float()
    if scale.ndim == 3:
        scale = scale.squeeze(2)
    if scale.ndim != 2 or not all(scale.shape) or rows % len(scale) or columns % scale.shape[1]:
        raise PartError(f"its scales are {_describe(scale)}")
    scales = scale.repeat_interleave(rows // len(scale), 0)
    return _pack(family, parts, scales.flatten(), group=columns // scale.shape[1])


def _mxfp8(settings: Mapping, parts: Parts) -> PackedTensor:
    return _pack(MXFP8, parts, _scales_in_order(MXFP8, parts))


def _nvfp4(settings: Mapping, parts: Parts) -> PackedTensor:
    scales = _scales_in_order(NVFP4_ROWS, parts)
    return _pack(NVFP4_ROWS, parts, scales, _row_scales(parts, SCALE_2))


READERS: dict[str, Callable[[Mapping, Parts], PackedTensor]] = {
    "float8_e4m3fn": partial(_rows_of, F8_E4M3),
    "float8_e5m2": partial(_rows_of, F8_E5M2),
    "float8_e4m3fn_rowwise": partial(_rows_of, F8_E4M3),
    "float8_e4m3fn_blockwise": partial(_blocks_of, F8_E4M3),
    "float8_e4m3fn_block3d": partial(_blocks_of, F8_E4M3),
    "mxfp8": _mxfp8,
    "hybrid_mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "int8_tensorwise": _int8,
    "int8_blockwise": partial(_blocks_of, INT8_GROUPS),
    "convrot_w4a4": partial(_rotated, INT4_CONVROT),
}


def _pack(family: type[RowFormat], parts: Parts, *sides: torch.Tensor,
          group: int | None = None) -> PackedTensor:
    codes = parts["weight"].contiguous().view(torch.uint8)
    rows, columns = len(codes), codes.shape[1] * 8 // family.bits
    if columns % (group or family.group or 1):
        raise PartError(f"its rows have {columns} columns")
    return packed_tensor(family.of_columns(columns, group), codes.view(-1), (rows, columns),
                         torch.float32, *sides)


def _part(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise PartError(f"its {name} is missing")
    return parts[name]


def _row_scales(parts: Parts, name: str) -> torch.Tensor:
    """Returns a scale for each row, float32 (N,), of one for each, (N,) or (N, 1), or of one."""
    scale, rows = _part(parts, name), len(parts["weight"])
    if scale.numel() not in (1, rows):
        raise PartError(f"its {name} is {_describe(scale)}")
    return scale.float().flatten().expand(rows).contiguous()


def _scales_in_order(family: type[RowFormat], parts: Parts) -> torch.Tensor:
    """Returns scales that are stored in blocks as bytes in the order of the values, flat."""
    scale, weight = _part(parts, SCALE), parts["weight"]
    rows, columns = len(weight), weight.shape[1] * 8 // family.bits // family.group
    pieces = -(-rows // PIECE_ROWS), -(-columns // PIECE_COLUMNS)
    stored = pieces[0] * PIECE_ROWS, pieces[1] * PIECE_COLUMNS
    if scale.itemsize != 1 or scale.numel() != stored[0] * stored[1]:
        raise PartError(f"its {SCALE} is {_describe(scale)}")
    blocks = scale.contiguous().view(torch.uint8).view(*pieces, 32, 4, PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(stored)[:rows, :columns].flatten()


def _setting(settings: Mapping, name: str, default: Any) -> Any:
    """Returns a setting; old writers nest them in `params`."""
    nested = settings.get("params")
    return settings.get(name, nested.get(name, default) if isinstance(nested, dict) else default)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
