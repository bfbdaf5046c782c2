"""ComfyUI's own quantised formats: several tensors in the file, one packed tensor.

A layer that `pack_parts` reads, or `layer_parts` makes, has the `PARTS` of its format,
`comfy_quant`, settings in JSON, and may have `pre_quant_scale` (K,), factors of its input. Scales
in pieces are in the order of cuBLAS: pieces of 128 rows and 4 columns, of mxfp8 for 32 columns of
the weight and of nvfp4 for 16. Codes of asym_w4a8_int8 have 4 or 6 bits, and tables or corrections,
but not both.

Sources: comfy-kitchen 0.2.26 and 0.2.40 `tensor/*.py`, ComfyUI 0.30 and 0.33 `comfy/ops.py`,
convert_to_quant.
"""
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
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
    ROTATED,
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
from ...ops.formats.row_layout import RowFamily, RowFormat
from ...ops.formats.svdquant import INPUT_SHIFT, SVDQUANT_INT4, SVDQUANT_INT4_HALF
from ...ops.tensor.packed_layout import (
    is_packed,
    packed_rows,
    packed_tensor,
    packed_tensors,
    with_input_shift,
    with_low_rank,
    with_taps_first,
)
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import describe
from .base import HeaderOf, Quantizer
from .comfyui_marks import marked_layers
from .comfyui_settings import CONVROT, FORMAT, LINEAR_DTYPE, ROTATION_SIZE, is_rotated, setting
from .parts import FLOATS, GET_OTHER_CONVERSION, Part, PartError, Parts, bind_sizes

SCALE, SCALE_2, SMOOTHING = "weight_scale", "weight_scale_2", "pre_quant_scale"
# of asym_w4a8_int8
GROUP_SCALE, ROW_SCALE = "weight_s_rel", "weight_s_channel"
CODEBOOK, CORRECTION = "weight_codebook", "weight_correction"
ZEROS = "weight_zeros"  # of awq_w4a16, as comfy-kitchen writes it
# tensors of a layer that say nothing about the values of its weight
IGNORED = ("comfy_quant", "input_scale", "weight_scalar")
HALVES = (torch.bfloat16, torch.float16)
FP8 = {torch.float8_e4m3fn: F8_E4M3, torch.float8_e5m2: F8_E5M2}
OTHER_MARK = "Its comfy_quant names a format that its weights are not in: get another conversion."
LEAST_OF_EXPERTS = 32  # bytes of a row of experts; the kernel of a convolution has fewer
MAX_ROTATION = 4096  # columns; a rotation takes memory of their square
ROTATION = 256  # columns, where the settings name no other number
LEVEL_GROUP = 16  # columns, likewise
PIECE_ROWS, PIECE_COLUMNS = 128, 4  # of scales in blocks

# of svdquant_w4a4, whose names may begin with "weight_"
SMOOTH, DOWN, UP = "smooth_factor", "proj_down", "proj_up"
TILE = 128  # rows of svdquant_w4a4
SLICE_VALUES = 1 << 17  # that are dequantised at a time, in the cache of a core

Sizes = Mapping[str, int]


FP8_CODES = Part("(N, K)", (*FP8, torch.uint8), advice=OTHER_MARK)
BYTES = Part("(N, K)", (torch.int8, torch.uint8), advice=OTHER_MARK)
NIBBLES = Part("(N, K / 2)", BYTES.dtypes, advice=OTHER_MARK)
OF_ROWS = Part("1 or N", FLOATS)
OF_BLOCKS = Part("(R, C) or (R, C, 1)", FLOATS)
# in the order of cuBLAS
IN_PIECES = Part("", (*(dtype for dtype in FLOATS if dtype.itemsize == 1), *BYTES.dtypes))
OTHER_SCALE = {SCALE_2: Part("", optional=SCALE_2)}  # which must be 1
LEVELS = {"weight": Part("(N, W)", BYTES.dtypes, advice=OTHER_MARK), GROUP_SCALE: Part("(N, G)"),
          ROW_SCALE: OF_ROWS, CODEBOOK: Part("(16,)", optional=CODEBOOK),
          CORRECTION: Part("(G, N)", optional=CORRECTION)}
_OF_LOW_RANK = {
    SMOOTH: Part("K", other_names=(f"weight_{SMOOTH}",)),
    DOWN: Part("(K, R)", (*HALVES, torch.float32), "low rank", (f"weight_{DOWN}",)),
    UP: Part("(N, R) or (N / 128, R, 128)", (*HALVES, torch.float32), "low rank",
             (f"weight_{UP}",))}
TILED = "svdquant_w4a4 in tiles"
# formats of kernels of convolutions
OF_KERNELS = ("int8_tensorwise", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")
# format of one scale or of rows -> the one that it is where the scales are those of blocks
IN_BLOCKS = dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise"),
                          "float8_e4m3fn_blockwise") | {"int8_tensorwise": "int8_blockwise"}
# format, the last one of codes in tiles -> what the parts of a weight must be
PARTS: dict[str, dict[str, Part]] = {
    **{name: {"weight": FP8_CODES, SCALE: OF_ROWS, **OTHER_SCALE}
       for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")},
    **{name: {"weight": FP8_CODES, SCALE: OF_BLOCKS, **OTHER_SCALE}
       for name in ("float8_e4m3fn_blockwise", "float8_e4m3fn_block3d")},
    **{name: {"weight": FP8_CODES, SCALE: IN_PIECES, **OTHER_SCALE}
       for name in ("mxfp8", "hybrid_mxfp8")},
    "nvfp4": {"weight": NIBBLES, SCALE: IN_PIECES, SCALE_2: OF_ROWS},
    "int8_tensorwise": {"weight": BYTES, SCALE: OF_ROWS, **OTHER_SCALE},
    "int8_blockwise": {"weight": BYTES, SCALE: OF_BLOCKS, **OTHER_SCALE},
    "convrot_w4a4": {"weight": NIBBLES, SCALE: OF_ROWS, **OTHER_SCALE},
    "asym_w4a8_int8": LEVELS, "w6a8_int8": LEVELS,
    "awq_w4a16": {"weight": NIBBLES, SCALE: Part("(G, N)", FLOATS),
                  ZEROS: Part("(G, N)", FLOATS, other_names=("weight_zero",))},  # comfy-quants
    "svdquant_w4a4": {"weight": NIBBLES, SCALE: Part("(K / 64, N)", HALVES), **_OF_LOW_RANK},
    TILED: {"weight": Part("(N / 128, K / 64, 32, 128)", BYTES.dtypes, advice=OTHER_MARK),
            SCALE: Part("(N / 128, K / 64, 128)", HALVES), **_OF_LOW_RANK},
}


# format -> what the parts of a kernel must be
KERNEL_PARTS = {
    name: PARTS[name] | {"weight": replace(PARTS[name]["weight"], shape="(N, C, T...)")}
    for name in OF_KERNELS}


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers that are marked as ComfyUI's."""
    yield from marked_layers(metadata, names)


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
        settings: of the layer's `comfy_quant`, which `check_settings` takes.
        parts: the last parts of their names -> the layer's tensors.

    Returns:
        A packed tensor of (N, K), padded as in the file, or of (N, C, ...), the kernel of a
        convolution; None for a format, or with a part, that is not read here.

    Raises:
        PartError: the parts do not belong together.
    """
    name, second = format_of(settings), parts.get(SCALE_2)
    if second is not None and OTHER_SCALE.items() <= PARTS.get(name, {}).items() and bool(
            (second.float() != 1).any()):
        raise PartError(f"it has {SCALE_2}, which {name} has not")
    if has_block_scales(parts["weight"], parts.get(SCALE)) and not is_rotated(name, settings):
        settings = {**settings, FORMAT: IN_BLOCKS.get(name, name)}
    read = READERS.get(format_of(settings))
    if read is None:
        return None
    if is_kernel(settings, parts["weight"]):
        return _kernel(settings, parts)
    expected, parts = _layout(settings, parts)
    smoothing = parts.pop(SMOOTHING, None)
    if set(parts) - set(expected):
        return None
    packed = read(settings, parts, bind_sizes(parts, expected))
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


def is_kernel(settings: Mapping[str, Any], codes: torch.Tensor) -> bool:
    """Returns whether a weight is the kernel of a convolution.

    Others of more than two dimensions are codes in tiles, and those of banks of experts (E, N, W).
    """
    is_tiled = format_of(settings) == "svdquant_w4a4"
    return codes.ndim > 2 and not is_tiled and not has_rows_of_experts(codes)


def has_rows_of_experts(codes: torch.Tensor) -> bool:
    """Returns whether codes are those of stacked experts by their shape alone, (E, N, W)."""
    return codes.ndim == 3 and codes.shape[2] >= LEAST_OF_EXPERTS


def _kernel(settings: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> PackedTensor:
    """Reads the kernel of a convolution, (N, C, ...), with a scale for each row, or one.

    Where it is rotated, groups of the input channels C are, at each position of the kernel. Source:
    ussoewwin/ComfyUI-HSWQ-Loader-and-Tools `native_convert_int8.py`.
    """
    name = format_of(settings)
    if name not in OF_KERNELS:
        raise PartError(f"it is {describe(parts['weight'])}, the kernel of a convolution, expected"
                        f" one of {', '.join(OF_KERNELS)}", GET_OTHER_CONVERSION)
    parts = {part: tensor for part, tensor in parts.items() if part not in IGNORED}
    sizes = bind_sizes(parts, KERNEL_PARTS[name])
    codes, scale = parts["weight"], _row_scales(parts, SCALE)
    rotates = is_rotated(name, settings)
    if name != "int8_tensorwise":
        if rotates:
            raise PartError("it is the kernel of a convolution in fp8 that is rotated, which is not"
                            " read", GET_OTHER_CONVERSION)
        family = FP8.get(codes.dtype, F8_E5M2 if name == "float8_e5m2" else F8_E4M3)
        return packed_rows(family, codes, codes.shape, scale=scale)
    if not rotates:
        return packed_rows(INT8_ROWS, codes, codes.shape, scale=scale)
    rotation = _rotation(settings, sizes["C"])
    if sizes["T"] == 1:
        return packed_rows(INT8_CONVROT, codes, codes.shape, (rotation,), scale=scale)
    taps = codes.flatten(2).transpose(1, 2)
    packed = packed_rows(INT8_CONVROT, taps, taps.shape, (rotation,), scale=scale)
    return with_taps_first(packed, codes.shape)


def _layout(settings: Mapping[str, Any],
            parts: Mapping[str, torch.Tensor]) -> tuple[Mapping[str, Part], Parts]:
    """Returns what the parts of a weight must be, and those that matter under their names there."""
    is_tiled = format_of(settings) == "svdquant_w4a4" and parts["weight"].ndim == 4
    expected = PARTS[TILED if is_tiled else format_of(settings)]
    names = {each: name for name, part in expected.items() for each in part.other_names}
    return expected, {names.get(name, name): tensor for name, tensor in parts.items()
                      if name not in IGNORED}


def smooth(packed: PackedTensor, factors: torch.Tensor) -> PackedTensor:
    """Returns a weight of rows with a factor for each column, which its layer has for its input.

    Raises:
        PartError: there is not one for each column, or the format takes none.
    """
    packed_format: Any = packed.params.format
    columns = packed.shape[1]
    family = SMOOTHED.get(packed_format.family)
    missing = columns - factors.numel()  # of the columns that fill a row up
    if family is None or packed.ndim > 2 or not 0 <= missing < packed_format.padding:
        raise PartError(f"its {SMOOTHING} is {describe(factors)}")
    factors = torch.nn.functional.pad(factors.float().flatten(), (0, missing), value=1)
    data, *sides = [*packed_tensors(packed), factors]
    return packed_tensor(family.of_columns(columns, *packed_format.sizes), data, packed.shape,
                         packed.dtype, *sides)


def _rows_of(family: RowFamily, settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor:
    """Reads a format with scales of rows, or one scale, or those of groups in pieces."""
    layout = family.example
    in_pieces = layout.groups > 1
    tensors = {"scale": _scales_in_order(family, parts) if in_pieces else _row_scales(parts, SCALE)}
    if layout.row_scale:
        tensors["row_scale"] = _row_scales(parts, SCALE_2)
    return _pack(family, parts, (), _rotation(settings, sizes["K"]), **tensors)


def _nibbles(settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor:
    return _pack(INT4_CONVROT, parts, (_rotation(settings, sizes["K"]),),
                 scale=_row_scales(parts, SCALE))


def _rotation(settings: Mapping, columns: int) -> int:
    """Returns the number of columns that are rotated together, 0 where none are."""
    if not is_rotated(format_of(settings), settings):
        return 0
    group = _size(settings, ROTATION_SIZE, ROTATION)
    if not 4 <= group <= MAX_ROTATION or math.log(group, 4) % 1 or columns % group:
        raise PartError(f"columns are rotated in groups of {group} of {columns}")
    return group


def _levels(settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor | None:
    """Reads asym_w4a8_int8; None where the scales are no bytes."""
    scale, stored = parts[GROUP_SCALE], sizes["W"] * 8
    is_of_six = format_of(settings) == "w6a8_int8"
    group = stored // 6 // max(1, sizes["G"]) if is_of_six else LEVEL_GROUP
    level_group = _size(settings, "group_size", group)
    columns = sizes["G"] * level_group
    bits = stored / max(1, columns)
    if level_group < 1 or bits not in ((6,) if is_of_six else (4, 6)) or (
            bits != _size(settings, "bits", int(bits))):
        raise PartError(f"it has {bits:g} bits a value")
    if setting(settings, "symmetric", True) is False and CORRECTION not in parts:
        raise PartError(f"it has no {CORRECTION}, expected one as it is not symmetric")
    if scale.itemsize != 1:
        return None
    tensors = {"scale": scale, "row_scale": _row_scales(parts, ROW_SCALE)}
    codebook, correction = parts.get(CODEBOOK), parts.get(CORRECTION)
    family = W4A8_INTEGERS
    rotation = _rotation(settings, columns)
    if stored == columns * 6:
        if codebook is not None or correction is not None or columns % 8:
            return None
        family, parts = W6A8, parts | {"weight": _six_bits(parts["weight"], columns)}
    elif codebook is not None:
        if correction is not None:
            return None
        family = W4A8
        if not torch.equal(codebook.float(), torch.tensor(NORMAL, dtype=torch.float32)):
            family = W4A8_TABLE
            tensors["numbers"] = codebook.float()
    elif correction is not None:
        is_half = correction.dtype == torch.bfloat16
        family = W4A8_SHIFTED if is_half else W4A8_SHIFTED_FLOAT
        tensors["minimum"] = (correction if is_half else correction.float()).t()
    return _pack(family, parts, (rotation, level_group), 0, **tensors)


def _six_bits(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Brings codes whose upper bits come after all low nibbles of a row into `W6A8`'s order."""
    low, upper = codes.view(torch.uint8).split([columns // 2, columns // 4], 1)
    groups = torch.cat([low.view(-1, columns // 8, 4), upper.view(-1, columns // 8, 2)], 2)
    return groups.view(codes.shape)


def _blocks_of(family: RowFamily, settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor:
    """Reads a format whose scales belong to blocks of rows and columns, or of columns."""
    rows, columns = sizes["N"], sizes["K"]
    if rows % sizes["R"] or columns % sizes["C"]:
        raise PartError(f"its scales are {describe(parts[SCALE])}, which do not divide a weight of"
                        f" ({rows}, {columns})")
    group = columns // sizes["C"]
    given = [_size(settings, name, group) for name in ("group_size", "block_size")]
    if any(size not in (0, group) for size in given):
        raise PartError(f"its groups have {group} columns, expected {max(given)} by its"
                        " comfy_quant", GET_OTHER_CONVERSION)
    scale = parts[SCALE].float().view(sizes["R"], sizes["C"])
    scales = scale.repeat_interleave(rows // sizes["R"], 0)
    return _pack(family, parts, (group,), scale=scales)


def _awq(settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor:
    group, scale, zeros = _size(settings, "group_size", AWQ_GROUP), parts[SCALE], parts[ZEROS]
    family = {torch.bfloat16: W4A16, torch.float16: W4A16_HALF}.get(scale.dtype, W4A16_FLOAT)
    if group < 1 or sizes["K"] // group != sizes["G"] or zeros.dtype != scale.dtype:
        raise PartError(f"its {SCALE} and {ZEROS} are {describe(scale)} and {describe(zeros)}")
    dtype = family.example.scale.dtype
    return _pack(family, parts, (group,), scale=scale.to(dtype).t(), minimum=zeros.to(dtype).t())


def _svdquant(settings: Mapping, parts: Parts, sizes: Sizes) -> PackedTensor:
    main = packed = _svdquant_main(parts)
    if DOWN in parts:
        if setting(settings, "lowrank_branch_input_basis", "raw") != "raw":
            raise PartError("its low rank multiplies another input than the layer's")
        up = parts[UP]
        packed = with_low_rank(main, up.transpose(1, 2).flatten(0, 1) if up.ndim == 3 else up,
                               parts[DOWN].t())
    if setting(settings, "act_unsigned", False):
        return with_input_shift(packed, bias_of_shift(main))
    return packed


def _svdquant_main(parts: Parts) -> PackedTensor:
    """Returns the weight without its low rank."""
    codes, scale = parts["weight"].contiguous().view(torch.uint8), parts[SCALE]
    if codes.ndim == 2:
        scale = scale.t()
    else:
        tiles, groups = codes.shape[:2]
        codes = codes.view(tiles, groups, TILE // 4, 4, TILE // 4).permute(0, 2, 3, 1, 4)
        codes = codes.reshape(tiles * TILE, groups * TILE // 4)
        scale = scale.transpose(1, 2).flatten(0, 1)
    family = SVDQUANT_INT4 if scale.dtype == torch.bfloat16 else SVDQUANT_INT4_HALF
    return _pack(family, {"weight": codes}, scale=scale,
                 row_scale=torch.ones(len(codes), dtype=torch.float32),
                 column_scale=1 / parts[SMOOTH].float().flatten())


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


def bias_of_shift(main: PackedTensor) -> torch.Tensor:
    """Returns what `INPUT_SHIFT`, added to the input of a weight, adds to the bias, float32 (N,).

    Args:
        main: the weight (N, K), without the low rank, which sees the input without it.
    """
    packed_format, tensors = main.params.format, packed_tensors(main)
    rows, columns = main.shape
    # an even number of rows: torch sums a single one in the order of its threads
    step = max(1, SLICE_VALUES // columns // 2) * 2
    workspace = torch.empty((step, columns), dtype=torch.float32, device=main.device)
    sums = []
    for first in range(0, rows, step):
        values = workspace[:rows - first]
        sums.append(packed_format.dequantize_into(tensors, values, first=first).sum(1))
    return torch.cat(sums) * INPUT_SHIFT


READERS: dict[str, Callable[[Mapping, Parts, Sizes], PackedTensor | None]] = {
    "float8_e4m3fn": partial(_rows_of, F8_E4M3),
    "float8_e5m2": partial(_rows_of, F8_E5M2),
    "float8_e4m3fn_rowwise": partial(_rows_of, F8_E4M3),
    "float8_e4m3fn_blockwise": partial(_blocks_of, F8_E4M3),
    "float8_e4m3fn_block3d": partial(_blocks_of, F8_E4M3),
    "mxfp8": partial(_rows_of, MXFP8),
    "hybrid_mxfp8": partial(_rows_of, MXFP8),
    "nvfp4": partial(_rows_of, NVFP4_ROWS),
    "int8_tensorwise": partial(_rows_of, INT8_ROWS),
    "int8_blockwise": partial(_blocks_of, INT8_GROUPS),
    "convrot_w4a4": _nibbles,
    "asym_w4a8_int8": _levels,
    "w6a8_int8": _levels,
    "awq_w4a16": _awq,
    "svdquant_w4a4": _svdquant,
}

# name of a family -> the key of `ops.packing.row_types.ROW_TYPES` whose weights are of it
ROW_TYPE_OF = {
    INT8_CONVROT.name: "int8_convrot", INT8_ROWS.name: "int8_convrot",
    F8_E4M3.name: "float8_e4m3fn", MXFP8.name: "mxfp8", NVFP4_ROWS.name: "nvfp4",
    INT4_CONVROT.name: "convrot_w4a4",
    **{family.name: "asym_w4a8_int8" for family in (W4A8, W4A8_INTEGERS, W4A8_TABLE)}}
Settings = dict[str, Any]


def row_type_of(weight: torch.Tensor) -> str | None:
    """Returns the key of ROW_TYPES whose files can hold a weight bit for bit, None for none."""
    packed_format: Any = weight.params.format if is_packed(weight) and weight.ndim == 2 else None
    name = ROW_TYPE_OF.get(getattr(packed_format, "family", ""))
    if name not in ("float8_e4m3fn", "nvfp4") or not is_packed(weight):
        return name
    layout = packed_format.layout  # files have one number in the place of those of rows
    numbers = weight.params.row_scale if layout.row_scale else weight.params.scale
    is_one = layout.row_scale or layout.groups == 1
    return name if is_one and numbers is not None and bool((numbers == numbers[0]).all()) else None


def layer_parts(weight: PackedTensor) -> tuple[Settings, Parts]:
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
    codes, *sides = packed_tensors(weight)
    tensors = {qparam.name: side for qparam, side in zip(packed_format.qparams, sides)}
    missing = -len(weight) % packed_format.padding
    codes = torch.nn.functional.pad(codes.view(len(weight), -1), (0, 0, 0, missing))
    return WRITERS[packed_format.family](packed_format, codes, tensors)


def _float_parts(packed_format: RowFormat, codes: torch.Tensor,
                 tensors: Parts) -> tuple[Settings, Parts]:
    layout, scale = packed_format.layout, tensors["scale"]
    if packed_format.family == F8_E4M3.name:  # one number for all rows
        parts = {SCALE: scale[0]}
    elif not layout.row_scale:
        parts = {SCALE: _scales_in_pieces(packed_format, scale)}
    else:
        parts = {SCALE: _scales_in_pieces(packed_format, scale).view(torch.float8_e4m3fn),
                 SCALE_2: tensors["row_scale"][0]}
    return {"format": ROW_TYPE_OF[packed_format.family]}, {
        "weight": codes if layout.codes.bits == 4 else codes.view(layout.codes.dtype), **parts}


def _int8_parts(packed_format: RowFormat, codes: torch.Tensor,
                tensors: Parts) -> tuple[Settings, Parts]:
    settings: Settings = {"format": "int8_tensorwise"}
    if packed_format.layout.rotation:
        settings |= {CONVROT: True, ROTATION_SIZE: packed_format.layout.rotation}
    return settings, {"weight": codes.view(torch.int8), SCALE: tensors["scale"].view(-1, 1)}


def _int4_parts(packed_format: RowFormat, codes: torch.Tensor,
                tensors: Parts) -> tuple[Settings, Parts]:
    settings = {"format": "convrot_w4a4", ROTATION_SIZE: packed_format.layout.rotation,
                LINEAR_DTYPE: "int8"}
    return settings, {"weight": codes.view(torch.int8), SCALE: tensors["scale"].flatten()}


def _level_parts(packed_format: RowFormat, codes: torch.Tensor,
                 tensors: Parts) -> tuple[Settings, Parts]:
    layout = packed_format.layout
    settings = {"format": "asym_w4a8_int8", "group_size": layout.group,
                ROTATION_SIZE: layout.rotation}
    scale = tensors["scale"].view(len(codes), -1)
    parts = {"weight": codes.view(torch.int8), GROUP_SCALE: scale.view(torch.float8_e4m3fn),
             ROW_SCALE: tensors["row_scale"]}
    if packed_format.family == W4A8.name:
        parts[CODEBOOK] = torch.tensor(NORMAL, dtype=torch.float32, device=codes.device)
    elif packed_format.family == W4A8_TABLE.name:
        parts[CODEBOOK] = tensors["numbers"]
    return settings, parts


WRITERS: dict[str, Callable[[RowFormat, torch.Tensor, Parts], tuple[Settings, Parts]]] = {
    F8_E4M3.name: _float_parts, MXFP8.name: _float_parts, NVFP4_ROWS.name: _float_parts,
    INT8_ROWS.name: _int8_parts, INT8_CONVROT.name: _int8_parts, INT4_CONVROT.name: _int4_parts,
    W4A8.name: _level_parts, W4A8_INTEGERS.name: _level_parts, W4A8_TABLE.name: _level_parts}


def _pack(family: RowFamily, parts: Parts, sizes: tuple[int, ...] = (), rotation: int = 0,
          **tensors: torch.Tensor) -> PackedTensor:
    codes = parts["weight"]
    if family in FP8.values():  # which of two kinds of fp8; as uint8 the mark says so
        family = FP8.get(codes.dtype, family)
    rows, columns = len(codes), codes.shape[1] * 8 // family.example.codes.bits
    group = (sizes or family.sizes or (0,))[0]
    if columns % (group or 1):
        raise PartError(f"its rows have {columns} columns")
    if rotation:
        family, sizes = ROTATED[family.name], (rotation, *sizes)
    return packed_rows(family, codes, (rows, columns), sizes, **tensors)


def _row_scales(parts: Parts, name: str) -> torch.Tensor:
    """Returns a scale for each row, float32 (N,), of one for each, (N,) or (N, 1), or of one."""
    rows = len(parts["weight"])
    return parts[name].float().flatten().expand(rows).contiguous()


def _scales_in_order(family: RowFamily, parts: Parts) -> torch.Tensor:
    """Returns scales that are stored in blocks as bytes in the order of the values, flat."""
    scale, weight = parts[SCALE], parts["weight"]
    layout = family.example
    rows, columns = len(weight), weight.shape[1] * 8 // layout.codes.bits // layout.group
    pieces, stored = _pieces(rows, columns)
    if scale.numel() != math.prod(stored) or (
            scale.ndim == 2 and tuple(scale.shape) != stored):
        raise PartError(f"its {SCALE} is {describe(scale)}, expected {stored}")
    blocks = scale.contiguous().view(torch.uint8).view(*pieces, 32, 4, PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(stored)[:rows, :columns].flatten()


def _scales_in_pieces(packed_format: RowFormat, scale: torch.Tensor) -> torch.Tensor:
    """Returns scales in the order of the values, flat bytes, as files store them, (R, C)."""
    columns = packed_format.layout.groups
    rows = scale.numel() // columns
    pieces, stored = _pieces(rows, columns)
    scale = torch.nn.functional.pad(
        scale.view(rows, columns), (0, stored[1] - columns, 0, stored[0] - rows))
    blocks = scale.view(pieces[0], 4, 32, pieces[1], PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(stored)


def _pieces(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns how many pieces hold the scales of a weight, and the rows and columns of them all."""
    pieces = -(-rows // PIECE_ROWS), -(-columns // PIECE_COLUMNS)
    return pieces, (pieces[0] * PIECE_ROWS, pieces[1] * PIECE_COLUMNS)


def _size(settings: Mapping, name: str, default: int) -> int:
    """Returns a number of columns from the settings, 0 where it is no number."""
    try:
        return int(setting(settings, name, default))
    except (TypeError, ValueError, OverflowError):
        return 0


QUANTIZER = Quantizer(name="ComfyUI's own formats", find=find, layouts=PARTS, in_file=False)
