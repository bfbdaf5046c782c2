"""Kernels in Triton, for CUDA and ROCm: dequantising in one pass, products with few input rows
directly from the packed bytes, and the codes of the int8 product.

Tile sizes are fixed, because tuning them on the user's machine would take longer than most
pictures. Numbers that differ from layer to layer are not specialised, so that the kernel that was
checked is the one that runs. The tile sizes were derived from the assembly (loads per value,
barriers, shared memory) and have not been measured on a GPU yet.
"""
import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats.base import Format
from ..formats.rotation import rotation_signs
from ..layers.int8_codes import LARGEST_CODE, SIDE, TINY, side_matrix
from .kernel import Backend, Kernel, WrongResult
from .triton_decode import DECODERS, Decoder

ROW_FAMILIES = ("F8_E4M3", "F8_E5M2", "INT8_GROUPS", "MXFP8", "NVFP4_ROWS", "NVFP4_LOW",
                "INT8_CONVROT", "INT4_CONVROT", "W4A8", "W4A8_INTEGERS", "W6A8")
DEQUANTIZE_TILE = 4096  # values that a program dequantises
# Weight rows of a program, and columns that it sums at a time: for one row of the input, and for
# up to `MAX_TOKENS`, which is one tile of the matrix units.
ONE_TOKEN_TILE = (2, 1024)
FEW_TOKENS_TILE = (16, 128)
MAX_TOKENS = 16
SIDES = {0: 1, 16: 16, 64: 64, 256: 16}  # columns that are rotated -> the side of a factor
CODES_TILE = 1024  # columns of a row that are rotated at a time, whole groups
FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
TRITON_DTYPES = {
    None: None, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}


@triton.jit
def _round_to(values, DTYPE: tl.constexpr):
    if DTYPE is None:
        return values
    else:
        return values.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["size", "values", "first"])
def _dequantize(data, size, scales, table, out, values, first, DECODE: tl.constexpr,
                GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr,
                GROUPS: tl.constexpr):
    """Writes `values` values from group `first` of the weight on. A program takes GROUPS groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, GROUP)[None, :]
    index = group * GROUP + lane
    weight_group = first + tl.minimum(group, (values - 1) // GROUP)
    decoded = _round_to(DECODE(data, size, scales, table, weight_group, lane, BLOCK_LENGTH),
                       VALUE_DTYPE)
    tl.store(out + index, decoded.to(out.dtype.element_ty), mask=index < values)


@triton.jit(do_not_specialize=["size", "rows", "addend_row"])
def _linear_one_token(data, size, scales, table, input, addend, out, rows, columns, addend_row,
                      addend_column, DECODE: tl.constexpr, GROUP: tl.constexpr,
                      BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr, ROWS: tl.constexpr,
                      GROUPS: tl.constexpr):
    """Multiplies one row of the input. A program takes ROWS rows of the weight, and sums GROUPS
    groups of columns at a time."""
    per_row = columns // GROUP
    slot = tl.arange(0, ROWS * GROUPS)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + slot // GROUPS
    start = tl.minimum(row, rows - 1) * per_row
    lane = tl.arange(0, GROUP)[None, :]
    total = tl.zeros((ROWS * GROUPS, GROUP), tl.float32)
    for first in range(0, per_row, GROUPS):
        group = first + slot % GROUPS
        weight_group = start + tl.minimum(group, per_row - 1)
        weight = _round_to(DECODE(data, size, scales, table, weight_group, lane, BLOCK_LENGTH),
                          VALUE_DTYPE)
        x = tl.load(input + group * GROUP + lane, mask=group < per_row, other=0).to(tl.float32)
        total = tl.fma(x, weight, total)
    sums = tl.sum(tl.reshape(tl.sum(total, 1), (ROWS, GROUPS)), 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if addend is not None:
        sums += tl.load(addend + row * addend_column, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + row, sums.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["size", "tokens", "rows", "addend_row"])
def _linear_few_tokens(data, size, scales, table, input, addend, out, tokens, rows, columns,
                       addend_row, addend_column, DECODE: tl.constexpr, GROUP: tl.constexpr,
                       BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr, ROWS: tl.constexpr,
                       GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """Multiplies up to TOKENS rows of the input, in the input's dtype, and sums in float32."""
    per_row = columns // GROUP
    slot = tl.arange(0, ROWS * GROUPS)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + slot // GROUPS
    start = tl.minimum(row, rows - 1) * per_row
    lane = tl.arange(0, GROUP)[None, :]
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, GROUPS * GROUP)[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, per_row, GROUPS):
        weight_group = start + tl.minimum(first + slot % GROUPS, per_row - 1)
        weight = _round_to(DECODE(data, size, scales, table, weight_group, lane, BLOCK_LENGTH),
                          VALUE_DTYPE)
        weight = tl.reshape(weight.to(input.dtype.element_ty), (ROWS, GROUPS * GROUP))
        index = first * GROUP + column
        x = tl.load(input + token * columns + index, mask=(token < tokens) & (index < columns),
                    other=0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    is_inside = (token < tokens) & (row < rows)
    if addend is not None:
        total += tl.load(addend + token * addend_row + row * addend_column, mask=is_inside,
                         other=0).to(tl.float32)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["values"])
def _dequantize_rows(data, scales, row_scales, numbers, scale_numbers, signs, out, values,
                     COLUMNS: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr,
                     SCALE_GROUP: tl.constexpr, ROTATED: tl.constexpr, SIDE: tl.constexpr,
                     ROOT: tl.constexpr, VALUE_DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Writes rows of a weight whose block is a row. A program takes TILE values.

    numbers: that of each code. scale_numbers: that of each byte of `scales`; None: they are floats.
    ROTATED: the columns that are rotated together, SIDE or SIDE * SIDE; 0: none.
    """
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < values
    place = tl.minimum(index, values - 1)
    if BITS == 8:
        code = tl.load(data + place).to(tl.int32)
    elif BITS == 4:
        shift = (1 - place % 2 if HIGH_FIRST else place % 2) * 4
        code = tl.load(data + place // 2).to(tl.int32) >> shift.to(tl.int32) & 15
    else:
        eight, lane = data + place // 8 * 6, (place % 8).to(tl.int32)
        code = tl.load(eight + lane // 2).to(tl.int32) >> lane % 2 * 4 & 15
        code |= (tl.load(eight + 4 + lane // 4).to(tl.int32) >> lane % 4 * 2 & 3) << 4
    number = tl.load(numbers + code)
    row = place // COLUMNS
    if SCALE_GROUP:
        scale = tl.load(scales + place // SCALE_GROUP)
        if scale_numbers is not None:
            scale = tl.load(scale_numbers + scale.to(tl.int32))
    if ROTATED:
        if SCALE_GROUP:
            number = number * scale + 12582912.0 - 12582912.0  # 1.5 * 2**23: ties to even
            number = tl.minimum(tl.maximum(number, -127.0), 127.0)
        side = _load_side(signs, SIDE)
        if ROTATED == SIDE:
            number = tl.reshape(tl.dot(tl.reshape(number, (TILE // SIDE, SIDE)), side,
                                       input_precision="ieee"), (TILE,))
        else:
            number = _rotate(number, side, TILE, SIDE)
        scale = tl.load(row_scales + row) / ROOT
    elif row_scales is not None:
        scale *= tl.load(row_scales + row)
    value = _round_to(number * scale, VALUE_DTYPE)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(values, side, TILE: tl.constexpr, SIDE: tl.constexpr):
    """Returns `int8_codes.rotate` of values, float32 (TILE,). side: float32 (SIDE, SIDE)."""
    half = tl.dot(tl.reshape(values, (TILE // SIDE, SIDE)), side, input_precision="ieee")
    half = tl.permute(tl.reshape(half, (TILE // SIDE // SIDE, SIDE, SIDE)), (0, 2, 1))
    whole = tl.dot(tl.reshape(half, (TILE // SIDE, SIDE)), side, input_precision="ieee")
    return tl.reshape(tl.permute(tl.reshape(whole, (TILE // SIDE // SIDE, SIDE, SIDE)), (0, 2, 1)),
                      (TILE,))


@triton.jit
def _load_side(matrix, SIDE: tl.constexpr):
    return tl.load(matrix + tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :])


@triton.jit
def _weight_tile(data, size, scales, table, row, first, columns, DECODE: tl.constexpr,
                 GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr,
                 TILE: tl.constexpr):
    """Returns a row's values from column `first` of the weight on, and zeros after its end."""
    per_row = columns // GROUP
    group = first // GROUP + tl.arange(0, TILE // GROUP)[:, None]
    weight_group = row * per_row + tl.minimum(group, per_row - 1)
    lane = tl.arange(0, GROUP)[None, :]
    values = _round_to(DECODE(data, size, scales, table, weight_group, lane, BLOCK_LENGTH),
                      VALUE_DTYPE)
    return tl.reshape(tl.where(group < per_row, values, 0.0), (TILE,))


@triton.jit
def _scale(largest, not_finite, TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """Returns the scale of a row. largest: its largest magnitude. not_finite: 1 if a value is not
    finite, else 0."""
    return tl.where(not_finite > 0, float("nan"), tl.maximum(largest, TINY) / LARGEST_CODE)


@triton.jit
def _store_codes(codes, values, scale, mask):
    tl.store(codes, tl.floor(values / scale + 0.5).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["size", "first"])
def _int8_rows(data, size, scales, table, matrix, codes, code_scales, first, columns,
               DECODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
               VALUE_DTYPE: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
               TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """Encodes one row of the weight per program, which dequantises and rotates it twice, because
    it may not fit into registers."""
    row = tl.program_id(0).to(tl.int64)
    side = _load_side(matrix, SIDE)
    lane = tl.arange(0, TILE)
    largest, not_finite = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    for start in range(0, columns, TILE):
        values = _weight_tile(data, size, scales, table, first + row, start, columns, DECODE, GROUP,
                              BLOCK_LENGTH, VALUE_DTYPE, TILE)
        values = tl.abs(_rotate(values, side, TILE, SIDE))
        largest = tl.maximum(largest, values)
        not_finite = tl.where(values < float("inf"), not_finite, 1)
    scale = _scale(tl.max(largest, 0), tl.max(not_finite, 0), TINY, LARGEST_CODE)
    for start in range(0, columns, TILE):
        values = _weight_tile(data, size, scales, table, first + row, start, columns, DECODE, GROUP,
                              BLOCK_LENGTH, VALUE_DTYPE, TILE)
        _store_codes(codes + row * columns + start + lane, _rotate(values, side, TILE, SIDE),
                     scale, start + lane < columns)
    tl.store(code_scales + row, scale)


@triton.jit
def _int8_tokens(input, matrix, codes, code_scales, columns, TILE: tl.constexpr, SIDE: tl.constexpr,
                 TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """Encodes one row of the input per program."""
    row = tl.program_id(0).to(tl.int64)
    side = _load_side(matrix, SIDE)
    lane = tl.arange(0, TILE)
    largest, not_finite = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    for start in range(0, columns, TILE):
        values = tl.load(input + row * columns + start + lane, mask=start + lane < columns,
                         other=0).to(tl.float32)
        values = tl.abs(_rotate(values, side, TILE, SIDE))
        largest = tl.maximum(largest, values)
        not_finite = tl.where(values < float("inf"), not_finite, 1)
    scale = _scale(tl.max(largest, 0), tl.max(not_finite, 0), TINY, LARGEST_CODE)
    for start in range(0, columns, TILE):
        values = tl.load(input + row * columns + start + lane, mask=start + lane < columns,
                         other=0).to(tl.float32)
        _store_codes(codes + row * columns + start + lane, _rotate(values, side, TILE, SIDE),
                     scale, start + lane < columns)
    tl.store(code_scales + row, scale)


def _decoder(packed_format: Format) -> Decoder:
    return next(DECODERS[name] for name in packed_format.kernel_names() if name in DECODERS)


def _weight_arguments(packed_format: Format,
                      tensors: list[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Returns the first arguments of every kernel on weights, and its constants."""
    decoder = _decoder(packed_format)
    if packed_format.block_length % decoder.group:
        raise NotImplementedError(f"blocks of {packed_format.block_length} values do not divide "
                                  f"into groups of {decoder.group}")
    data = tensors[0] if tensors[0].data_ptr() % 4 == 0 else tensors[0].clone()
    scales = tensors[1] if packed_format.qparams else None
    table = decoder.table(packed_format, data.device) if decoder.table else None
    return (data, data.numel(), scales, table), {
        "DECODE": decoder.function,
        "GROUP": decoder.group,
        "BLOCK_LENGTH": packed_format.block_length,
        "VALUE_DTYPE": TRITON_DTYPES[None],
        # A fused multiply-add rounds once where the reference rounds twice.
        "enable_fp_fusion": False,
    }


def _launch(kernel, programs: int, device: torch.device, *arguments, **constants):
    # Triton launches on the current device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants)


def dequantize(packed_format, tensors, out, first):
    """See `Kernel.run`."""
    weight, constants = _weight_arguments(packed_format, tensors)
    group = constants["GROUP"]
    _launch(_dequantize, triton.cdiv(out.numel(), DEQUANTIZE_TILE), out.device, *weight, out,
            out.numel(), first * (packed_format.block_length // group),
            GROUPS=DEQUANTIZE_TILE // group, **constants)


def dequantize_rows(packed_format, tensors, out, first):
    """See `Kernel.run`; for the families of `ROW_FAMILIES`."""
    columns, device, layout = packed_format.block_length, out.device, packed_format.layout
    rotated = layout.rotation
    if out.numel() % columns or not out.numel() or rotated not in SIDES:
        packed_format.dequantize_into(tensors, out, first)
        return
    data, *sides = packed_format.blocks(tensors, first, first + out.numel() // columns)
    scales, row_scales, scale_numbers, signs = sides[0], None, None, None
    scale_group = layout.group
    if rotated:
        signs = rotation_signs(SIDES[rotated], device)
    if len(sides) > 1:
        row_scales = sides[1]
    elif rotated:
        row_scales, scale_group = sides[0], 0
    if scales.dtype == torch.uint8:
        scale_numbers = packed_format.constant("scale_numbers", device)
    _launch(_dequantize_rows, triton.cdiv(out.numel(), DEQUANTIZE_TILE), device, data, scales,
            row_scales, packed_format.constant("code_numbers", device), scale_numbers, signs, out,
            out.numel(), COLUMNS=columns, BITS=layout.codes.bits,
            HIGH_FIRST=layout.codes.order == "high first", SCALE_GROUP=scale_group,
            ROTATED=rotated, SIDE=SIDES[rotated], ROOT=float(rotated or 1)**0.5,
            VALUE_DTYPE=TRITON_DTYPES[None], TILE=DEQUANTIZE_TILE, enable_fp_fusion=False)


def linear_one_token(packed_format, tensors, input, addend, out):
    """See `Kernel.run`."""
    _linear(_linear_one_token, (), ONE_TOKEN_TILE, packed_format, tensors, input, addend, out,
            )


def linear_few_tokens(packed_format, tensors, input, addend, out):
    """See `Kernel.run`."""
    stages = _decoder(packed_format).stages
    options = {"TOKENS": MAX_TOKENS} | ({"num_stages": stages} if stages else {})
    _linear(_linear_few_tokens, (len(input),), FEW_TOKENS_TILE, packed_format, tensors, input,
            addend, out, **options)


def _linear(kernel, tokens, tile, packed_format, tensors, input, addend, out,
            **options):
    weight, constants = _weight_arguments(packed_format, tensors)
    rows, columns = tile
    strides = (0, 0) if addend is None else addend.stride()
    _launch(kernel, triton.cdiv(out.shape[1], rows), out.device, *weight, input, addend, out,
            *tokens, out.shape[1], input.shape[1], *strides, ROWS=rows,
            GROUPS=columns // constants["GROUP"], **constants, **options)


CODE_CONSTANTS = {"TILE": CODES_TILE, "SIDE": SIDE, "TINY": TINY, "LARGEST_CODE": LARGEST_CODE}


def int8_rows(packed_format, tensors, codes, scales, first):
    """See `Kernel.run`."""
    weight, constants = _weight_arguments(packed_format, tensors)
    rows, columns = codes.shape
    first_row = first * packed_format.block_length // columns
    _launch(_int8_rows, rows, codes.device, *weight, side_matrix(codes.device), codes, scales,
            first_row, columns, **CODE_CONSTANTS, **constants)


def int8_tokens(input, codes, scales):
    """See `Kernel.run`."""
    _launch(_int8_tokens, len(input), codes.device, input, side_matrix(input.device), codes, scales,
            input.shape[1], **CODE_CONSTANTS)


@triton.jit
def _increment(numbers):
    index = numbers + tl.arange(0, 16)
    tl.store(index, tl.load(index) + 1)


def probe(device: torch.device):
    """Runs a tiny kernel: an importable Triton may lack a compiler, a driver or GPU support."""
    numbers = torch.arange(16, dtype=torch.int32, device=device)
    _launch(_increment, 1, device, numbers)
    if numbers.tolist() != list(range(1, 17)):
        raise WrongResult("Triton's first kernel added wrongly")


_formats = frozenset(DECODERS)
BACKEND = Backend("triton", probe, (
    Kernel("dequantize", _formats, FLOATS, dequantize),
    Kernel("dequantize", frozenset(ROW_FAMILIES), FLOATS, dequantize_rows),
    Kernel("linear", _formats, FLOATS, linear_one_token, max_tokens=1),
    Kernel("linear", _formats, FLOATS, linear_few_tokens, min_tokens=2, max_tokens=MAX_TOKENS),
    Kernel("int8_rows", _formats, frozenset([torch.int8]), int8_rows),
    Kernel("int8_tokens", frozenset(), FLOATS, int8_tokens),
))
