"""ComfyUI's own quantised formats: a record for each, with what reads it and what writes it.

Scales in pieces are in the order of cuBLAS: pieces of 128 rows and 4 columns, of mxfp8 for 32
columns of the weight and of nvfp4 for 16. Codes of asym_w4a8_int8 have 4 or 6 bits, and tables or
corrections, but not both.

Sources: comfy-kitchen 0.2.26 and 0.2.40 `tensor/*.py`, ComfyUI 0.30 and 0.33 `comfy/ops.py`,
convert_to_quant.
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ...ops.formats.comfy_quant import (
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
from ...ops.formats.row_layout import RowFamily, RowLayout
from ...ops.formats.svdquant import INPUT_SHIFT, SVDQUANT_INT4, SVDQUANT_INT4_HALF
from ...ops.tensor.packed_layout import (
    packed_rows,
    packed_tensors,
    with_input_shift,
    with_low_rank,
    with_taps_first,
)
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import describe
from .parts import FLOATS, GET_OTHER_CONVERSION, Part, PartError, Parts

# names of parts
SCALE, SCALE_2, SMOOTHING = "weight_scale", "weight_scale_2", "pre_quant_scale"
GROUP_SCALE, ROW_SCALE = "weight_s_rel", "weight_s_channel"
CODEBOOK, CORRECTION = "weight_codebook", "weight_correction"
ZEROS = "weight_zeros"  # as comfy-kitchen writes it
SMOOTH, DOWN, UP = "smooth_factor", "proj_down", "proj_up"  # or with "weight_" before them
# those that say nothing about the values of a weight
IGNORED = ("comfy_quant", "input_scale", "weight_scalar")
# names of settings
FORMAT, NESTED = "format", "params"  # old writers nest settings in `params`
CONVROT, ROTATION_SIZE = "convrot", "convrot_groupsize"
# what ComfyUI rounds inputs to, "int8" or "int4", which it is without
LINEAR_DTYPE = "linear_dtype"
OFF = (None, False, 0, "", "none", "off", "false", "no")
INT8 = "int8_tensorwise"  # which INT8-Fast's settings mean, though they name no format

HALVES = (torch.bfloat16, torch.float16)
FP8 = {torch.float8_e4m3fn: F8_E4M3, torch.float8_e5m2: F8_E5M2}
OTHER_MARK = "Its comfy_quant names a format that its weights are not in: get another conversion."
MAX_ROTATION = 4096  # columns; a rotation takes memory of their square
ROTATION = 256  # columns, where the settings name no other number
LEVEL_GROUP = 16  # columns, likewise
PIECE_ROWS, PIECE_COLUMNS = 128, 4  # of scales in blocks
TILE = 128  # rows of codes in tiles
SLICE_VALUES = 1 << 17  # that are dequantised at a time, in the cache of a core

Settings = Mapping[str, Any]
Values = tuple[Any, ...] | None
Written = tuple[dict[str, Any], Parts]


class Stored(NamedTuple):
    """A weight as a file has it: the settings of its layer's `comfy_quant`, and its parts, of which
    `sizes` has those that the shapes of the format name."""
    format: "ComfyUIFormat"
    settings: Settings
    parts: Parts
    sizes: Mapping[str, int]

    def number(self, name: str, default: int) -> int:
        """Returns a number of columns from the settings, 0 where it is no number."""
        try:
            return int(setting(self.settings, name, default))
        except (TypeError, ValueError, OverflowError):
            return 0

    def rotation(self, columns: int) -> int:
        """Returns the number of columns that are rotated together, 0 where none are."""
        if not is_rotated(self.settings):
            return 0
        group = self.number(ROTATION_SIZE, ROTATION)
        if not 4 <= group <= MAX_ROTATION or math.log(group, 4) % 1 or columns % group:
            raise PartError(f"columns are rotated in groups of {group} of {columns}")
        return group

    def row_scales(self, name: str = SCALE) -> torch.Tensor:
        """Returns a scale for each row, float32 (N,), of one for each, (N,) or (N, 1), or one."""
        return self.parts[name].float().flatten().expand(len(self.parts["weight"])).contiguous()

    def pack(self, family: RowFamily, sizes: tuple[int, ...] = (), rotation: int = 0,
             codes: torch.Tensor | None = None, **tensors: torch.Tensor) -> PackedTensor:
        """Returns the weight in a family, whose codes are `codes`, or as they are."""
        codes = self.parts["weight"] if codes is None else codes
        if family in FP8.values():  # which of two kinds of fp8; as uint8 the mark says so
            family = FP8.get(codes.dtype, family)
        rows, columns = len(codes), codes.shape[1] * 8 // family.example.codes.bits
        group = (sizes or family.sizes or (0,))[0]
        if columns % (group or 1):
            raise PartError(f"its rows have {columns} columns")
        if rotation:
            family, sizes = ROTATED[family.name], (rotation, *sizes)
        return packed_rows(family, codes, (rows, columns), sizes, **tensors)


@dataclass(frozen=True, kw_only=True)
class ComfyUIFormat:
    """One of ComfyUI's own formats.

    Attributes:
        name: in a layer's `comfy_quant`.
        family: of the packed tensors that its weights become, one of them where there are several.
        parts: of a weight, but `SMOOTHING`, factors of the input (K,), and `IGNORED`.
        in_tiles: likewise where the codes have four dimensions; {}: they never have.
        settings: those that `read` uses -> the values that it takes, None: checks, or takes any.
        read: returns a packed tensor of (N, K), padded as in the file, or None for what is not read
            here. Raises PartError where the parts do not belong together.
        read_kernel: likewise of (N, C, ...), the kernel of a convolution; None: it has none.
        of_blocks: the format that it is where scales are those of blocks; "": they never are.
        has_banks: whether its banks of experts are read.
        is_rotated: whether columns are rotated where no setting says so.
        host_rotates: whether ComfyUI undoes rotation.
        is_of_one_number: whether files have one number in the place of those of rows.
        written: families of packed tensors that files can hold bit for bit.
        write: returns the settings and parts of such a weight, besides its format and codes, from
            its layout and tensors.
        row_type: key of `ops.packing.pack_types.ROW_TYPES` for its packed tensors; "": its name.
        since: first version of ComfyUI that reads it; "": the oldest one here, or none does.
        capability: least compute capability of an NVIDIA GPU on which ComfyUI multiplies it without
            converting its weights first; int8's product fails on some older ones.
    """
    name: str
    family: RowFamily
    parts: Mapping[str, Part]
    in_tiles: Mapping[str, Part] = field(default_factory=dict)
    settings: Mapping[str, Values]
    read: Callable[[Stored], PackedTensor | None]
    read_kernel: Callable[[Stored], PackedTensor] | None = None
    of_blocks: str = ""
    has_banks: bool = False
    is_rotated: bool = False
    host_rotates: bool = False
    is_of_one_number: bool = False
    written: tuple[RowFamily, ...] = ()
    write: Callable[[RowLayout, Parts], Written] | None = None
    row_type: str = ""
    since: str = ""
    capability: tuple[int, int] = (8, 0)


def setting(settings: Settings, name: str, default: Any) -> Any:
    """Returns a setting, `default` where there is none."""
    nested = settings.get(NESTED)
    return settings.get(name, nested.get(name, default) if isinstance(nested, dict) else default)


def format_of(settings: Settings) -> str:
    """Returns the name of the format that a layer's settings mean, "" for none."""
    name = settings.get(FORMAT)
    if name is None and settings.get("per_row") is True:
        return INT8
    return name if isinstance(name, str) else ""


def known_format(settings: Settings) -> "ComfyUIFormat | None":
    """Returns the format of a layer, None for one that is not read here."""
    return COMFYUI_FORMATS.get(format_of(settings))


def is_rotated(settings: Settings) -> bool:
    """Returns whether the columns of a weight are rotated in groups."""
    known = known_format(settings)
    return (known is not None and known.is_rotated) or bool(setting(settings, CONVROT, False))


def _rows(stored: Stored) -> PackedTensor:
    """Reads scales of rows, or one scale, or those of groups in pieces."""
    family = stored.format.family
    layout = family.example
    tensors = {"scale": _scales_in_order(stored) if layout.groups > 1 else stored.row_scales()}
    if layout.row_scale:
        tensors["row_scale"] = stored.row_scales(SCALE_2)
    return stored.pack(family, (), stored.rotation(stored.sizes["K"]), **tensors)


def _blocks(stored: Stored) -> PackedTensor:
    """Reads scales of blocks of rows and columns, or of columns."""
    sizes, scale = stored.sizes, stored.parts[SCALE]
    rows, columns = sizes["N"], sizes["K"]
    if rows % sizes["R"] or columns % sizes["C"]:
        raise PartError(f"its scales are {describe(scale)}, which do not divide a weight of"
                        f" ({rows}, {columns})")
    group = columns // sizes["C"]
    given = [stored.number(name, group) for name in ("group_size", "block_size")]
    if any(size not in (0, group) for size in given):
        raise PartError(f"its groups have {group} columns, expected {max(given)} by its"
                        " comfy_quant", GET_OTHER_CONVERSION)
    scales = scale.float().view(sizes["R"], sizes["C"]).repeat_interleave(rows // sizes["R"], 0)
    return stored.pack(stored.format.family, (group,), scale=scales)


def _fp8_kernel(stored: Stored) -> PackedTensor:
    if is_rotated(stored.settings):
        raise PartError("it is the kernel of a convolution in fp8 that is rotated, which is not"
                        " read", GET_OTHER_CONVERSION)
    codes = stored.parts["weight"]
    family = FP8.get(codes.dtype, stored.format.family)
    return packed_rows(family, codes, codes.shape, scale=stored.row_scales())


def _int8_kernel(stored: Stored) -> PackedTensor:
    """Reads a kernel with a scale for each row, or one.

    Where it is rotated, groups of the input channels C are, at each position of the kernel. Source:
    ussoewwin/ComfyUI-HSWQ-Loader-and-Tools `native_convert_int8.py`.
    """
    codes, scale = stored.parts["weight"], stored.row_scales()
    if not is_rotated(stored.settings):
        return packed_rows(INT8_ROWS, codes, codes.shape, scale=scale)
    rotation = stored.rotation(stored.sizes["C"])
    if stored.sizes["T"] == 1:
        return packed_rows(INT8_CONVROT, codes, codes.shape, (rotation,), scale=scale)
    taps = codes.flatten(2).transpose(1, 2)
    packed = packed_rows(INT8_CONVROT, taps, taps.shape, (rotation,), scale=scale)
    return with_taps_first(packed, codes.shape)


def _nibbles(stored: Stored) -> PackedTensor:
    return stored.pack(INT4_CONVROT, (stored.rotation(stored.sizes["K"]),),
                       scale=stored.row_scales())


def _levels(stored: Stored) -> PackedTensor | None:
    """Reads codes whose numbers are rounded times their scales; None where these are no bytes."""
    parts, width = stored.parts, stored.sizes["W"] * 8
    is_of_six = stored.format.family is W6A8
    group = width // 6 // max(1, stored.sizes["G"]) if is_of_six else LEVEL_GROUP
    level_group = stored.number("group_size", group)
    columns = stored.sizes["G"] * level_group
    bits = width / max(1, columns)
    if level_group < 1 or bits not in ((6,) if is_of_six else (4, 6)) or (
            bits != stored.number("bits", int(bits))):
        raise PartError(f"it has {bits:g} bits a value")
    if setting(stored.settings, "symmetric", True) is False and CORRECTION not in parts:
        raise PartError(f"it has no {CORRECTION}, expected one as it is not symmetric")
    if parts[GROUP_SCALE].itemsize != 1:
        return None
    tensors = {"scale": parts[GROUP_SCALE], "row_scale": stored.row_scales(ROW_SCALE)}
    codebook, correction = parts.get(CODEBOOK), parts.get(CORRECTION)
    family, codes = W4A8_INTEGERS, None
    rotation = stored.rotation(columns)
    if width == columns * 6:
        if codebook is not None or correction is not None or columns % 8:
            return None
        family, codes = W6A8, _six_bits(parts["weight"], columns)
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
    return stored.pack(family, (rotation, level_group), 0, codes, **tensors)


def _six_bits(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Brings codes whose upper bits come after all low nibbles of a row into `W6A8`'s order."""
    low, upper = codes.view(torch.uint8).split([columns // 2, columns // 4], 1)
    groups = torch.cat([low.view(-1, columns // 8, 4), upper.view(-1, columns // 8, 2)], 2)
    return groups.view(codes.shape)


def _awq(stored: Stored) -> PackedTensor:
    group, scale, zeros = (stored.number("group_size", AWQ_GROUP), stored.parts[SCALE],
                           stored.parts[ZEROS])
    family = {torch.bfloat16: W4A16, torch.float16: W4A16_HALF}.get(scale.dtype, W4A16_FLOAT)
    if group < 1 or stored.sizes["K"] // group != stored.sizes["G"] or zeros.dtype != scale.dtype:
        raise PartError(f"its {SCALE} and {ZEROS} are {describe(scale)} and {describe(zeros)}")
    dtype = family.example.scale.dtype
    return stored.pack(family, (group,), scale=scale.to(dtype).t(), minimum=zeros.to(dtype).t())


def _svdquant(stored: Stored) -> PackedTensor:
    main = packed = _svdquant_main(stored)
    if DOWN in stored.parts:
        if setting(stored.settings, "lowrank_branch_input_basis", "raw") != "raw":
            raise PartError("its low rank multiplies another input than the layer's")
        up = stored.parts[UP]
        packed = with_low_rank(main, up.transpose(1, 2).flatten(0, 1) if up.ndim == 3 else up,
                               stored.parts[DOWN].t())
    if setting(stored.settings, "act_unsigned", False):
        return with_input_shift(packed, bias_of_shift(main))
    return packed


def _svdquant_main(stored: Stored) -> PackedTensor:
    """Returns the weight without its low rank."""
    codes, scale = stored.parts["weight"].contiguous().view(torch.uint8), stored.parts[SCALE]
    if codes.ndim == 2:
        scale = scale.t()
    else:
        tiles, groups = codes.shape[:2]
        codes = codes.view(tiles, groups, TILE // 4, 4, TILE // 4).permute(0, 2, 3, 1, 4)
        codes = codes.reshape(tiles * TILE, groups * TILE // 4)
        scale = scale.transpose(1, 2).flatten(0, 1)
    family = SVDQUANT_INT4 if scale.dtype == torch.bfloat16 else SVDQUANT_INT4_HALF
    return stored.pack(family, codes=codes, scale=scale,
                       row_scale=torch.ones(len(codes), dtype=torch.float32),
                       column_scale=1 / stored.parts[SMOOTH].float().flatten())


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


def _scales_in_order(stored: Stored) -> torch.Tensor:
    """Returns scales that are stored in pieces as bytes in the order of the values, flat."""
    scale, weight = stored.parts[SCALE], stored.parts["weight"]
    layout = stored.format.family.example
    rows, columns = len(weight), weight.shape[1] * 8 // layout.codes.bits // layout.group
    pieces, shape = _pieces(rows, columns)
    if scale.numel() != math.prod(shape) or (scale.ndim == 2 and tuple(scale.shape) != shape):
        raise PartError(f"its {SCALE} is {describe(scale)}, expected {shape}")
    blocks = scale.contiguous().view(torch.uint8).view(*pieces, 32, 4, PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(shape)[:rows, :columns].flatten()


def _scales_in_pieces(layout: RowLayout, scale: torch.Tensor) -> torch.Tensor:
    """Returns scales in the order of the values, flat bytes, as files store them, (R, C)."""
    rows, columns = scale.numel() // layout.groups, layout.groups
    pieces, shape = _pieces(rows, columns)
    scale = torch.nn.functional.pad(
        scale.view(rows, columns), (0, shape[1] - columns, 0, shape[0] - rows))
    blocks = scale.view(pieces[0], 4, 32, pieces[1], PIECE_COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(shape)


def _pieces(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns how many pieces hold the scales of a weight, and the rows and columns of them all."""
    pieces = -(-rows // PIECE_ROWS), -(-columns // PIECE_COLUMNS)
    return pieces, (pieces[0] * PIECE_ROWS, pieces[1] * PIECE_COLUMNS)


def _write_fp8(layout: RowLayout, tensors: Parts) -> Written:
    return {}, {SCALE: tensors["scale"][0]}


def _write_mxfp8(layout: RowLayout, tensors: Parts) -> Written:
    return {}, {SCALE: _scales_in_pieces(layout, tensors["scale"])}


def _write_nvfp4(layout: RowLayout, tensors: Parts) -> Written:
    scale = _scales_in_pieces(layout, tensors["scale"]).view(torch.float8_e4m3fn)
    return {}, {"weight": tensors["weight"], SCALE: scale, SCALE_2: tensors["row_scale"][0]}


def _write_int8(layout: RowLayout, tensors: Parts) -> Written:
    settings = {CONVROT: True, ROTATION_SIZE: layout.rotation} if layout.rotation else {}
    return settings, {SCALE: tensors["scale"].view(-1, 1)}


def _write_nibbles(layout: RowLayout, tensors: Parts) -> Written:
    return {ROTATION_SIZE: layout.rotation, LINEAR_DTYPE: "int8"}, {
        SCALE: tensors["scale"].flatten()}


def _write_levels(layout: RowLayout, tensors: Parts) -> Written:
    scale = tensors["scale"].view(len(tensors["weight"]), -1)
    parts = {GROUP_SCALE: scale.view(torch.float8_e4m3fn), ROW_SCALE: tensors["row_scale"]}
    if layout.has_own_numbers:
        parts[CODEBOOK] = tensors["numbers"]
    elif layout.codes.numbers == NORMAL:
        parts[CODEBOOK] = torch.tensor(NORMAL, dtype=torch.float32, device=scale.device)
    return {"group_size": layout.group, ROTATION_SIZE: layout.rotation}, parts


def _groups_of(count: int) -> dict[str, Values]:
    return dict.fromkeys(("group_size", "block_size"), (count, *OFF))


_NAMES: dict[str, Values] = dict.fromkeys((FORMAT, NESTED, "per_row"))
# readers turn values back where `convrot` says so, and check the number of columns
_MAY_BE_ROTATED = _NAMES | dict.fromkeys((CONVROT, ROTATION_SIZE, "weight_rotated"))
_IS_ROTATED = _MAY_BE_ROTATED | dict.fromkeys((CONVROT, "weight_rotated"), (True,))
_IN_GROUPS = _NAMES | dict.fromkeys(("group_size", "block_size"))  # which the reader compares

FP8_CODES = Part("(N, K)", (*FP8, torch.uint8), advice=OTHER_MARK)
BYTES = Part("(N, K)", (torch.int8, torch.uint8), advice=OTHER_MARK)
NIBBLES = Part("(N, K / 2)", BYTES.dtypes, advice=OTHER_MARK)
ROWS_PART = Part("1 or (N, 1...)", FLOATS)
PIECES_PART = Part("", (*(dtype for dtype in FLOATS if dtype.itemsize == 1), *BYTES.dtypes))
ALWAYS_1 = Part("", optional=SCALE_2)  # a second scale, which some tools write
_ROWS = {SCALE: ROWS_PART, SCALE_2: ALWAYS_1}
_BLOCKS = {SCALE: Part("(R, C) or (R, C, 1)", FLOATS), SCALE_2: ALWAYS_1}
_LOW_RANK = {
    SMOOTH: Part("K", other_names=(f"weight_{SMOOTH}",)),
    DOWN: Part("(K, R)", (*HALVES, torch.float32), "low rank", (f"weight_{DOWN}",)),
    UP: Part("(N, R) or (N / 128, R, 128)", (*HALVES, torch.float32), "low rank",
             (f"weight_{UP}",))}

_FP8_ROWS = ComfyUIFormat(
    name="float8_e4m3fn_rowwise", family=F8_E4M3, parts={"weight": FP8_CODES, **_ROWS},
    settings=_MAY_BE_ROTATED, read=_rows, read_kernel=_fp8_kernel,
    of_blocks="float8_e4m3fn_blockwise", has_banks=True)
_FP8_BLOCKS = ComfyUIFormat(
    name="float8_e4m3fn_blockwise", family=F8_E4M3, parts={"weight": FP8_CODES, **_BLOCKS},
    settings=_IN_GROUPS, read=_blocks)
_MXFP8 = ComfyUIFormat(
    name="hybrid_mxfp8", family=MXFP8, parts={"weight": FP8_CODES, SCALE: PIECES_PART,
                                              SCALE_2: ALWAYS_1},
    settings=_MAY_BE_ROTATED | _groups_of(32), read=_rows)
_LEVELS = ComfyUIFormat(
    name="w6a8_int8", family=W6A8, settings=_IS_ROTATED | dict.fromkeys(
        ("group_size", "bits", "symmetric")),
    parts={"weight": Part("(N, W)", BYTES.dtypes, advice=OTHER_MARK), GROUP_SCALE: Part("(N, G)"),
           ROW_SCALE: ROWS_PART, CODEBOOK: Part("(16,)", optional=CODEBOOK),
           CORRECTION: Part("(G, N)", optional=CORRECTION)},
    read=_levels, has_banks=True, is_rotated=True, host_rotates=True, since="0.38")
COMFYUI_FORMATS = {record.name: record for record in (
    ComfyUIFormat(
        name=INT8, family=INT8_ROWS, parts={"weight": BYTES, **_ROWS}, settings=_MAY_BE_ROTATED,
        read=_rows, read_kernel=_int8_kernel, of_blocks="int8_blockwise", has_banks=True,
        host_rotates=True, written=(INT8_CONVROT, INT8_ROWS), write=_write_int8,
        row_type="int8_convrot"),
    ComfyUIFormat(name="int8_blockwise", family=INT8_GROUPS, parts={"weight": BYTES, **_BLOCKS},
                  settings=_IN_GROUPS, read=_blocks),
    replace(_FP8_ROWS, name="float8_e4m3fn", is_of_one_number=True, written=(F8_E4M3,),
            write=_write_fp8, capability=(8, 9)),
    replace(_FP8_ROWS, name="float8_e5m2", family=F8_E5M2, capability=(8, 9)),
    _FP8_ROWS,
    _FP8_BLOCKS, replace(_FP8_BLOCKS, name="float8_e4m3fn_block3d"),
    replace(_MXFP8, name="mxfp8", written=(MXFP8,), write=_write_mxfp8, capability=(10, 0)),
    _MXFP8,
    ComfyUIFormat(
        name="nvfp4", family=NVFP4_ROWS, parts={"weight": NIBBLES, SCALE: PIECES_PART,
                                                SCALE_2: ROWS_PART},
        settings=_MAY_BE_ROTATED | _groups_of(16), read=_rows, is_of_one_number=True,
        written=(NVFP4_ROWS,), write=_write_nvfp4, capability=(10, 0)),
    ComfyUIFormat(
        name="convrot_w4a4", family=INT4_CONVROT, parts={"weight": NIBBLES, **_ROWS},
        settings=_IS_ROTATED, read=_nibbles, has_banks=True, is_rotated=True, host_rotates=True,
        written=(INT4_CONVROT,), write=_write_nibbles, since="0.28"),
    replace(_LEVELS, name="asym_w4a8_int8", family=W4A8, write=_write_levels, since="0.33",
            written=(W4A8, W4A8_INTEGERS, W4A8_TABLE)),
    _LEVELS,
    ComfyUIFormat(
        name="awq_w4a16", family=W4A16, settings=_IN_GROUPS, read=_awq,
        parts={"weight": NIBBLES, SCALE: Part("(G, N)", FLOATS),
               ZEROS: Part("(G, N)", FLOATS, other_names=("weight_zero",))}),  # comfy-quants
    ComfyUIFormat(
        name="svdquant_w4a4", family=SVDQUANT_INT4, read=_svdquant,
        parts={"weight": NIBBLES, SCALE: Part("(K / 64, N)", HALVES), **_LOW_RANK},
        in_tiles={"weight": Part("(N / 128, K / 64, 32, 128)", BYTES.dtypes, advice=OTHER_MARK),
                  SCALE: Part("(N / 128, K / 64, 128)", HALVES), **_LOW_RANK},
        settings=_NAMES | _groups_of(64) | dict.fromkeys((
            "act_unsigned", "lowrank_branch_input_basis", "proj_down_smooth_folded")) | {
                "layout": ("kitchen_tile_packed_w4a4", "natural", *OFF)}),
)}
# all names that parts of a layer have
PART_NAMES = (SMOOTHING, *IGNORED, *dict.fromkeys(
    name for record in COMFYUI_FORMATS.values() for title, part in record.parts.items()
    for name in (title, *part.other_names)))
