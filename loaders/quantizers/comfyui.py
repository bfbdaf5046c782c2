"""Reads weights in ComfyUI's own quantised formats: several tensors in the file, one packed tensor.

The weights of layer `L` of (N, K) that `pack_parts` reads; each has `L.comfy_quant`, settings in
JSON, and may have `pre_quant_scale` (K,), factors of its input:

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
| asym_w4a8_int8 | 4 bits (N, K / 2) or | `weight_s_rel` fp8 (N, K / g), |
| | 6 (N, K * 3 / 4) | `weight_s_channel` (N,), optional `weight_codebook` (16,) |
| | | or `weight_correction` (K / g, N) |
| awq_w4a16 | 4 bits (N, K / 2) | `weight_scale`, `weight_zeros` (K / 64, N) |
| svdquant_w4a4 | 4 bits (N, K / 2) | `weight_scale` (K / 64, N), `smooth_factor` (K,), |
| | | `proj_down` (K, R), `proj_up` (N, R), which may begin with `weight_` |
| | in tiles (N / 128, K / 64, 32, 128) | `weight_scale` (N / 128, K / 64, 128), `proj_up` |
| | | (N / 128, R, 128) |

"In blocks" is the order of cuBLAS: pieces of 128 rows and 4 columns of scales.
Sources: comfy-kitchen 0.2.26 and 0.2.40 `tensor/*.py`, ComfyUI 0.30 and 0.33 `comfy/ops.py`,
convert_to_quant.
"""
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ...ops.formats.comfyui import (
    AWQ_GROUP,
    F8_E4M3,
    F8_E5M2,
    INT4_CONVROT,
    INT8_CONVROT,
    INT8_GROUPS,
    INT8_ROWS,
    MXFP8,
    NORMAL,
    NVFP4_ROWS,
    SMOOTHED,
    W4A8,
    W4A8_INTEGERS,
    W4A8_SHIFTED,
    W4A8_SHIFTED_FLOAT,
    W4A8_TABLE,
    W4A16,
    W4A16_FLOAT,
    W4A16_HALF,
    W6A8,
)
from ...ops.formats.row_layout import RowFamily
from ...ops.formats.svdquant import INT4_GROUP, SVDQUANT_INT4, SVDQUANT_INT4_HALF
from ...ops.tensor.packed_layout import packed_rows, packed_tensor, packed_tensors, with_low_rank
from ...ops.tensor.packed_tensor import PackedTensor
from ...ops.tensor.row_slicing import dense, take_rows
from ..files.container import describe
from .base import Quantizer
from .comfyui_marks import marked_layers
from .parts import PartError, Parts


def part(parts, name):
    if name not in parts:
        raise PartError(f"its {name} is missing")
    return parts[name]

SCALE, SCALE_2, SMOOTHING = "weight_scale", "weight_scale_2", "pre_quant_scale"
# of asym_w4a8_int8
GROUP_SCALE, ROW_SCALE = "weight_s_rel", "weight_s_channel"
CODEBOOK, CORRECTION = "weight_codebook", "weight_correction"
ZEROS = ("weight_zeros", "weight_zero")  # of awq_w4a16, as comfy-kitchen and comfy-quants write
# tensors of a layer that say nothing about the values of its weight
IGNORED = ("comfy_quant", "input_scale", "weight_scalar")
HALVES = (torch.bfloat16, torch.float16)
FP8 = {torch.float8_e4m3fn: F8_E4M3, torch.float8_e5m2: F8_E5M2}
OTHER_MARK = "Its comfy_quant names a format that its weights are not in: get another conversion."
MAX_ROTATION = 4096  # columns; a rotation takes memory of their square
ROTATION = 256  # columns, where the settings name no other number
LEVEL_GROUP = 16  # columns, likewise
PIECE_ROWS, PIECE_COLUMNS = 128, 4  # of scales in blocks

# of svdquant_w4a4, whose names may begin with "weight_"
SMOOTH, DOWN, UP = "smooth_factor", "proj_down", "proj_up"
TILE = 128  # rows of svdquant_w4a4
# added to the inputs of SVDQuant's layers whose codes of inputs are unsigned
SHIFT = 0.171875
SLICE_VALUES = 1 << 22  # that are dequantised at a time


def format_of(settings: Mapping[str, Any]) -> str:
    """Returns the format that a layer's settings name, "" for none; INT8-Fast's leave it out."""
    name = settings.get("format")
    if name is None and settings.get("per_row") is True:
        return "int8_tensorwise"
    return name if isinstance(name, str) else ""


def pack_parts(settings: Mapping[str, Any],
               parts: Mapping[str, torch.Tensor]) -> PackedTensor | None:
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
    smoothing = parts.pop(SMOOTHING, None)
    if read is _svdquant:
        parts = {_svdquant_part(name): tensor for name, tensor in parts.items()}
    if read is None or set(parts) - {"weight", *PARTS.get(read, (SCALE, SCALE_2))}:
        return None
    weight = parts["weight"]
    if weight.ndim not in ((2, 4) if read is _svdquant else (2,)) or weight.itemsize != 1:
        raise PartError(f"its codes are {describe(weight)}")
    packed = read(settings, parts)
    return packed if packed is None or smoothing is None else smooth(packed, smoothing)


def smooth(packed: PackedTensor, factors: torch.Tensor) -> PackedTensor:
    """Returns a weight of rows with a factor for each column, which its layer has for its input.

    Raises:
        PartError: there is not one for each column, or the format takes none.
    """
    packed_format: Any = packed.layout_cls.format
    columns = packed.shape[1]
    family = SMOOTHED.get(packed_format.family)
    missing = columns - factors.numel()  # of the columns that fill a row up
    if family is None or not 0 <= missing < packed_format.padding:
        raise PartError(f"its {SMOOTHING} is {describe(factors)}")
    factors = torch.nn.functional.pad(factors.float().flatten(), (0, missing), value=1)
    data, *sides = [*packed_tensors(packed), factors]
    return packed_tensor(family.of_columns(columns, *packed_format.sizes), data, packed.shape,
                         packed.dtype, *sides)


def _rows_of(family: RowFamily, settings: Mapping, parts: Parts) -> PackedTensor:
    """Reads a format with one scale a row, or one scale."""
    return _pack(family, parts, scale=_row_scales(parts, SCALE))


def _int8(settings: Mapping, parts: Parts) -> PackedTensor:
    if _setting(settings, "convrot", False):
        return _rotated(INT8_CONVROT, settings, parts)
    return _rows_of(INT8_ROWS, settings, parts)


def _rotated(family: RowFamily, settings: Mapping, parts: Parts) -> PackedTensor:
    group = _rotation(settings, parts["weight"].shape[1] * 8 // family.example.codes.bits)
    return _pack(family, parts, (group,), scale=_row_scales(parts, SCALE))


def _rotation(settings: Mapping, columns: int) -> int:
    """Returns the number of columns that are rotated together."""
    group = _size(settings, "convrot_groupsize", ROTATION)
    if not 4 <= group <= MAX_ROTATION or math.log(group, 4) % 1 or columns % group:
        raise PartError(f"columns are rotated in groups of {group} of {columns}")
    return group


def _levels(settings: Mapping, parts: Parts) -> PackedTensor | None:
    """Reads asym_w4a8_int8; None where the scales are no bytes."""
    scale, stored = part(parts, GROUP_SCALE), parts["weight"].shape[1] * 8
    rows, level_group = len(parts["weight"]), _size(settings, "group_size", LEVEL_GROUP)
    if scale.ndim != 2 or len(scale) != rows or level_group < 1:
        raise PartError(f"its {GROUP_SCALE} is {describe(scale)}")
    columns = scale.shape[1] * level_group
    if columns == 0 or stored / columns not in (4, 6):
        raise PartError(f"it has {stored / max(1, columns):g} bits a value")
    if scale.itemsize != 1:
        return None
    sizes = _rotation(settings, columns), level_group
    tensors = {"scale": scale, "row_scale": _row_scales(parts, ROW_SCALE)}
    codebook, correction = parts.get(CODEBOOK), parts.get(CORRECTION)
    family = W4A8_INTEGERS
    if stored == columns * 6:
        if codebook is not None or correction is not None or columns % 8:
            return None
        family, parts = W6A8, parts | {"weight": _six_bits(parts["weight"], columns)}
    elif codebook is not None:
        if correction is not None:
            return None
        if codebook.shape != (16,):
            raise PartError(f"its {CODEBOOK} is {describe(codebook)}")
        family = W4A8
        if not torch.equal(codebook.float(), torch.tensor(NORMAL, dtype=torch.float32)):
            family = W4A8_TABLE
            tensors["numbers"] = codebook.float()
    elif correction is not None:
        if correction.shape != scale.shape[::-1]:
            raise PartError(f"its {CORRECTION} is {describe(correction)}")
        is_half = correction.dtype == torch.bfloat16
        family = W4A8_SHIFTED if is_half else W4A8_SHIFTED_FLOAT
        tensors["minimum"] = (correction if is_half else correction.float()).t()
    return _pack(family, parts, sizes, **tensors)


def _six_bits(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Brings codes whose upper bits come after all low nibbles of a row into `W6A8`'s order."""
    low, upper = codes.view(torch.uint8).split([columns // 2, columns // 4], 1)
    groups = torch.cat([low.view(-1, columns // 8, 4), upper.view(-1, columns // 8, 2)], 2)
    return groups.view(codes.shape)


def _blocks_of(family: RowFamily, settings: Mapping, parts: Parts) -> PackedTensor:
    """Reads a format whose scales belong to blocks of rows and columns, or of columns."""
    rows, columns = parts["weight"].shape
    given = part(parts, SCALE)
    scale = given.float()
    if scale.ndim == 3:
        scale = scale.squeeze(2)
    is_fitting = scale.ndim == 2 and all(scale.shape) and (
        rows % len(scale) == columns % scale.shape[1] == 0)
    if not is_fitting or not given.is_floating_point():
        raise PartError(f"its scales are {describe(given)}")
    scales = scale.repeat_interleave(rows // len(scale), 0)
    return _pack(family, parts, (columns // scale.shape[1],), scale=scales)


def _mxfp8(settings: Mapping, parts: Parts) -> PackedTensor:
    return _pack(MXFP8, parts, scale=_scales_in_order(MXFP8, parts))


def _nvfp4(settings: Mapping, parts: Parts) -> PackedTensor:
    scales = _scales_in_order(NVFP4_ROWS, parts)
    return _pack(NVFP4_ROWS, parts, scale=scales, row_scale=_row_scales(parts, SCALE_2))


def _awq(settings: Mapping, parts: Parts) -> PackedTensor:
    group = _size(settings, "group_size", AWQ_GROUP)
    zeros, scale = parts.get(ZEROS[1]), part(parts, SCALE)
    zeros = part(parts, ZEROS[0]) if zeros is None else zeros
    rows, columns = len(parts["weight"]), parts["weight"].shape[1] * 2
    family = {torch.bfloat16: W4A16, torch.float16: W4A16_HALF}.get(scale.dtype, W4A16_FLOAT)
    for side in (scale, zeros):
        if group < 1 or side.shape != (columns // group, rows) or side.dtype != scale.dtype:
            raise PartError(f"its {SCALE} and {ZEROS[0]} are {describe(scale)} and"
                            f" {describe(zeros)}")
    dtype = family.example.scale.dtype
    return _pack(family, parts, (group,), scale=scale.to(dtype).t(), minimum=zeros.to(dtype).t())


def _svdquant_part(name: str) -> str:
    """Returns the name of a part without "weight_" where others leave it out."""
    short = name.removeprefix("weight_")
    return short if short in (SMOOTH, DOWN, UP) else name


def _svdquant(settings: Mapping, parts: Parts) -> PackedTensor:
    main = _svdquant_main(settings, parts)
    if DOWN not in parts and UP not in parts:
        return main
    down, up = part(parts, DOWN), part(parts, UP)
    if up.ndim == 3:
        up = up.transpose(1, 2).flatten(0, 1)
    if (down.ndim != 2 or tuple(up.shape) != (len(main), down.shape[1])
            or len(down) != main.shape[1] or not {down.dtype, up.dtype} <= {*HALVES, torch.float32}
            or _setting(settings, "lowrank_branch_input_basis", "raw") != "raw"):
        raise PartError(f"its {DOWN} and {UP} are {describe(down)} and {describe(up)}, of a"
                        f" weight of {tuple(main.shape)}")
    return with_low_rank(main, up, down.t())


def _svdquant_main(settings: Mapping, parts: Parts) -> PackedTensor:
    """Returns the weight without its low rank."""
    codes, scale = parts["weight"].contiguous().view(torch.uint8), part(parts, SCALE)
    if codes.ndim == 4:
        if tuple(codes.shape[2:]) != (TILE // 4, TILE) or scale.ndim != 3:
            raise PartError(f"its codes are {describe(codes)} and its scales {describe(scale)}")
        tiles, groups = codes.shape[:2]
        codes = codes.view(tiles, groups, TILE // 4, 4, TILE // 4).permute(0, 2, 3, 1, 4)
        codes = codes.reshape(tiles * TILE, groups * TILE // 4)
        scale = scale.transpose(1, 2).flatten(0, 1)
    elif scale.ndim == 2:
        scale = scale.t()
    rows, columns = len(codes), codes.shape[1] * 2
    smooth_factor = part(parts, SMOOTH)
    if (columns % INT4_GROUP or scale.dtype not in HALVES
            or tuple(scale.shape) != (rows, columns // INT4_GROUP)):
        raise PartError(f"its {SCALE} is {describe(scale)} of {rows} rows and {columns} columns")
    if smooth_factor.numel() != columns:
        raise PartError(f"its {SMOOTH} is {describe(smooth_factor)}")
    family = SVDQUANT_INT4 if scale.dtype == torch.bfloat16 else SVDQUANT_INT4_HALF
    return _pack(family, {"weight": codes}, scale=scale, row_scale=torch.ones(
        rows, dtype=torch.float32), column_scale=1 / smooth_factor.float().flatten())


def shifted_bias(settings: Mapping[str, Any], parts: Mapping[str, torch.Tensor],
                 bias: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the bias of a layer with what a shift of its input adds.

    Without such a shift it returns `bias`.

    Args:
        settings, parts: see `pack_parts`, which has read them.
        bias: (N,), or None.

    Raises:
        PartError: the layer has no bias, or one of another length.
    """
    if format_of(settings) != "svdquant_w4a4" or not _setting(settings, "act_unsigned", False):
        return bias
    if bias is None:
        raise PartError("act_unsigned needs a bias")
    main = _svdquant_main(
        settings, {_svdquant_part(name): tensor for name, tensor in parts.items()})
    if bias.shape != main.shape[:1] or not bias.is_floating_point():
        raise PartError(f"its bias is {describe(bias)}, expected {len(main)} numbers")
    return bias.float() + bias_of_shift(main)


def bias_of_shift(main: PackedTensor) -> torch.Tensor:
    """Returns what `SHIFT`, added to the input of a weight, adds to the bias, float32 (N,).

    Args:
        main: the weight (N, K), without the low rank, which sees the input without it.
    """
    step = max(1, SLICE_VALUES // main.shape[1])
    slices = (take_rows(main, slice(row, row + step)) for row in range(0, len(main), step))
    return torch.cat([dense(rows).sum(1) for rows in slices]) * SHIFT


READERS: dict[str, Callable[[Mapping, Parts], PackedTensor | None]] = {
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
    "asym_w4a8_int8": _levels,
    "w6a8_int8": _levels,
    "awq_w4a16": _awq,
    "svdquant_w4a4": _svdquant,
}
# reader -> parts of a weight, where they are not the usual ones
PARTS = {_levels: (GROUP_SCALE, ROW_SCALE, CODEBOOK, CORRECTION), _awq: (SCALE, *ZEROS),
         _svdquant: (SCALE, SMOOTH, DOWN, UP)}


def _of_dtype(family: RowFamily, codes: torch.Tensor) -> RowFamily:
    """Returns the family that codes are of: their dtype says which of two kinds of fp8 it is.

    Older files have the bytes of fp8 as uint8, which leaves it to the mark.

    Raises:
        PartError: they are codes of another kind.
    """
    if family in FP8.values() and codes.dtype in FP8:
        return FP8[codes.dtype]
    codes_of = family.example.codes
    expected = codes_of.dtype if codes_of.bits == 8 else torch.int8
    if codes.dtype not in (expected, torch.uint8):
        raise PartError(f"its codes are {describe(codes)}, expected"
                        f" {str(expected).removeprefix('torch.')}", OTHER_MARK)
    return family


def _pack(family: RowFamily, parts: Parts, sizes: tuple[int, ...] = (),
          **tensors: torch.Tensor) -> PackedTensor:
    family = _of_dtype(family, parts["weight"])
    codes = parts["weight"]
    rows, columns = len(codes), codes.shape[1] * 8 // family.example.codes.bits
    group = (sizes or family.sizes or (0,))[0]
    if columns % (group or 1):
        raise PartError(f"its rows have {columns} columns")
    return packed_rows(family, codes, (rows, columns), sizes, **tensors)


def _row_scales(parts: Parts, name: str) -> torch.Tensor:
    """Returns a scale for each row, float32 (N,), of one for each, (N,) or (N, 1), or of one."""
    scale, rows = part(parts, name), len(parts["weight"])
    if scale.numel() not in (1, rows) or not scale.is_floating_point():
        raise PartError(f"its {name} is {describe(scale)}")
    return scale.float().flatten().expand(rows).contiguous()


def _scales_in_order(family: RowFamily, parts: Parts) -> torch.Tensor:
    """Returns scales that are stored in blocks as bytes in the order of the values, flat."""
    scale, weight = part(parts, SCALE), parts["weight"]
    layout = family.example
    rows, columns = len(weight), weight.shape[1] * 8 // layout.codes.bits // layout.group
    pieces = -(-rows // PIECE_ROWS), -(-columns // PIECE_COLUMNS)
    stored = pieces[0] * PIECE_ROWS, pieces[1] * PIECE_COLUMNS
    if scale.itemsize != 1 or scale.dtype == torch.bool or scale.numel() != math.prod(stored) or (
            scale.ndim == 2 and tuple(scale.shape) != stored):
        raise PartError(f"its {SCALE} is {describe(scale)}")
    blocks = scale.contiguous().view(torch.uint8).view(*pieces, 32, 4, PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(stored)[:rows, :columns].flatten()


def _size(settings: Mapping, name: str, default: int) -> int:
    """Returns a number of columns from the settings, 0 where it is no number."""
    try:
        return int(_setting(settings, name, default))
    except (TypeError, ValueError, OverflowError):
        return 0


def _setting(settings: Mapping, name: str, default: Any) -> Any:
    """Returns a setting; old writers nest them in `params`."""
    nested = settings.get("params")
    return settings.get(name, nested.get(name, default) if isinstance(nested, dict) else default)


QUANTIZER = Quantizer(name="ComfyUI's own formats", find=lambda names, metadata, header_of: (
    layer for layer in marked_layers(metadata, names) if f"{layer}.weight" in names), layouts={}, in_file=False)
