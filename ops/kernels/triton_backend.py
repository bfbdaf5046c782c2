"""Kernels in Triton, for CUDA and ROCm: dequantising in one pass, the product with few rows
straight from the packed bytes, and the codes of the int8 product.

Tiles are fixed here instead of tuned on the user's machine, which would take longer than most
pictures. Numbers that differ from layer to layer are not specialised, so that what was checked is
what runs. The tile sizes are reasoned from the assembly (loads per value, barriers, shared memory),
not measured on a GPU yet.
"""
import contextlib

import torch
import triton
import triton.language as tl

from ..int8_codes import LARGEST_CODE, SIDE, TINY, side_matrix
from .kernel import Backend, Kernel, WrongResult
from .triton_decode import DECODERS

DEQUANTIZE_TILE = 4096  # values a program dequantises
# One row of the input: a program sums rows of the weight this many at a time, this many columns at
# a time.
VECTOR_TILE = (2, 1024)
# Up to 16 rows, which is one tile of the matrix units.
ROWS_TILE = (16, 128)
MAX_TOKENS = 16
CODES_TILE = 1024  # columns of a row that are rotated at a time, whole groups
FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
TRITON_DTYPES = {
    None: None, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    if DTYPE is None:
        return values
    else:
        return values.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["size", "values", "first"])
def _dequantize(data, size, scales, table, out, values, first, DECODE: tl.constexpr,
                GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr,
                GROUPS: tl.constexpr):
    """`values` values of the weight from group `first` on. Each program takes GROUPS groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, GROUP)[None, :]
    index = group * GROUP + lane
    held = first + tl.minimum(group, (values - 1) // GROUP)
    decoded = _rounded(DECODE(data, size, scales, table, held, lane, BLOCK_LENGTH), VALUE_DTYPE)
    tl.store(out + index, decoded.to(out.dtype.element_ty), mask=index < values)


@triton.jit(do_not_specialize=["size", "rows", "addend_row"])
def _vector(data, size, scales, table, input, addend, out, rows, columns, addend_row, addend_column,
            DECODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
            VALUE_DTYPE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """One row of the input. Each program sums ROWS rows of the weight, GROUPS groups of columns at
    a time."""
    per_row = columns // GROUP
    place = tl.arange(0, ROWS * GROUPS)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + place // GROUPS
    start = tl.minimum(row, rows - 1) * per_row
    lane = tl.arange(0, GROUP)[None, :]
    total = tl.zeros((ROWS * GROUPS, GROUP), tl.float32)
    for first in range(0, per_row, GROUPS):
        group = first + place % GROUPS
        held = start + tl.minimum(group, per_row - 1)
        weight = _rounded(DECODE(data, size, scales, table, held, lane, BLOCK_LENGTH), VALUE_DTYPE)
        x = tl.load(input + group * GROUP + lane, mask=group < per_row, other=0).to(tl.float32)
        total = tl.fma(x, weight, total)
    sums = tl.sum(tl.reshape(tl.sum(total, 1), (ROWS, GROUPS)), 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if addend is not None:
        sums += tl.load(addend + row * addend_column, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + row, sums.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["size", "tokens", "rows", "addend_row"])
def _few_rows(data, size, scales, table, input, addend, out, tokens, rows, columns, addend_row,
              addend_column, DECODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
              VALUE_DTYPE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
              TOKENS: tl.constexpr):
    """Up to TOKENS rows of the input, multiplied in the input's dtype and summed in float32."""
    per_row = columns // GROUP
    place = tl.arange(0, ROWS * GROUPS)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + place // GROUPS
    start = tl.minimum(row, rows - 1) * per_row
    lane = tl.arange(0, GROUP)[None, :]
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, GROUPS * GROUP)[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, per_row, GROUPS):
        held = start + tl.minimum(first + place % GROUPS, per_row - 1)
        weight = _rounded(DECODE(data, size, scales, table, held, lane, BLOCK_LENGTH), VALUE_DTYPE)
        weight = tl.reshape(weight.to(input.dtype.element_ty), (ROWS, GROUPS * GROUP))
        at = first * GROUP + column
        x = tl.load(input + token * columns + at, mask=(token < tokens) & (at < columns), other=0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = (token < tokens) & (row < rows)
    if addend is not None:
        total += tl.load(addend + token * addend_row + row * addend_column, mask=inside,
                         other=0).to(tl.float32)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(values, side, TILE: tl.constexpr, SIDE: tl.constexpr):
    """See `int8_codes.rotate`. values: float32 (TILE,). side: float32 (SIDE, SIDE)."""
    half = tl.dot(tl.reshape(values, (TILE // SIDE, SIDE)), side, input_precision="ieee")
    half = tl.permute(tl.reshape(half, (TILE // SIDE // SIDE, SIDE, SIDE)), (0, 2, 1))
    whole = tl.dot(tl.reshape(half, (TILE // SIDE, SIDE)), side, input_precision="ieee")
    return tl.reshape(tl.permute(tl.reshape(whole, (TILE // SIDE // SIDE, SIDE, SIDE)), (0, 2, 1)),
                      (TILE,))


@triton.jit
def _side(matrix, SIDE: tl.constexpr):
    return tl.load(matrix + tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :])


@triton.jit
def _weight_tile(data, size, scales, table, row, first, columns, DECODE: tl.constexpr,
                 GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr, VALUE_DTYPE: tl.constexpr,
                 TILE: tl.constexpr):
    """Values of a row of the weight from column `first` on, zeros behind its end."""
    per_row = columns // GROUP
    group = first // GROUP + tl.arange(0, TILE // GROUP)[:, None]
    held = row * per_row + tl.minimum(group, per_row - 1)
    values = _rounded(
        DECODE(data, size, scales, table, held,
               tl.arange(0, GROUP)[None, :], BLOCK_LENGTH), VALUE_DTYPE)
    return tl.reshape(tl.where(group < per_row, values, 0.0), (TILE,))


@triton.jit
def _scale(largest, strange, TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """The scale of a row. largest: its largest magnitude. strange: more than 0 if it is not
    finite."""
    return tl.where(strange > 0, float("nan"), tl.maximum(largest, TINY) / LARGEST_CODE)


@triton.jit
def _store_codes(codes, values, scale, inside):
    tl.store(codes, tl.floor(values / scale + 0.5).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["size", "first"])
def _int8_rows(data, size, scales, table, matrix, codes, code_scales, first, columns,
               DECODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
               VALUE_DTYPE: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
               TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """A program codes one row; it dequantises and rotates it twice, since a row may not fit into
    registers."""
    row = tl.program_id(0).to(tl.int64)
    side = _side(matrix, SIDE)
    lane = tl.arange(0, TILE)
    largest, strange = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    for start in range(0, columns, TILE):
        values = _weight_tile(data, size, scales, table, first + row, start, columns, DECODE, GROUP,
                              BLOCK_LENGTH, VALUE_DTYPE, TILE)
        values = tl.abs(_rotated(values, side, TILE, SIDE))
        largest, strange = tl.maximum(largest, values), tl.where(values < float("inf"), strange, 1)
    scale = _scale(tl.max(largest, 0), tl.max(strange, 0), TINY, LARGEST_CODE)
    for start in range(0, columns, TILE):
        values = _weight_tile(data, size, scales, table, first + row, start, columns, DECODE, GROUP,
                              BLOCK_LENGTH, VALUE_DTYPE, TILE)
        _store_codes(codes + row * columns + start + lane, _rotated(values, side, TILE, SIDE),
                     scale, start + lane < columns)
    tl.store(code_scales + row, scale)


@triton.jit
def _int8_tokens(input, matrix, codes, code_scales, columns, TILE: tl.constexpr, SIDE: tl.constexpr,
                 TINY: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """A program codes one row of the input."""
    row = tl.program_id(0).to(tl.int64)
    side = _side(matrix, SIDE)
    lane = tl.arange(0, TILE)
    largest, strange = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    for start in range(0, columns, TILE):
        values = tl.load(input + row * columns + start + lane, mask=start + lane < columns,
                         other=0).to(tl.float32)
        values = tl.abs(_rotated(values, side, TILE, SIDE))
        largest, strange = tl.maximum(largest, values), tl.where(values < float("inf"), strange, 1)
    scale = _scale(tl.max(largest, 0), tl.max(strange, 0), TINY, LARGEST_CODE)
    for start in range(0, columns, TILE):
        values = tl.load(input + row * columns + start + lane, mask=start + lane < columns,
                         other=0).to(tl.float32)
        _store_codes(codes + row * columns + start + lane, _rotated(values, side, TILE, SIDE),
                     scale, start + lane < columns)
    tl.store(code_scales + row, scale)


def _decoder(packed_format):
    return next(DECODERS[base.__name__] for base in packed_format.__mro__
                if base.__name__ in DECODERS)


def _weight_arguments(packed_format, tensors, value_dtype) -> tuple[tuple, dict]:
    """The first arguments of every kernel, and what it is specialised for."""
    decoder = _decoder(packed_format)
    if packed_format.block_length % decoder.group:
        raise NotImplementedError(
            f"blocks of {packed_format.block_length} values are not groups of {decoder.group}")
    data = tensors[0] if tensors[0].data_ptr() % 4 == 0 else tensors[0].clone()
    scales = tensors[1] if packed_format.scales_apart else None
    table = decoder.table(packed_format, data.device) if decoder.table else None
    return (data, data.numel(), scales, table), {
        "DECODE": decoder.function,
        "GROUP": decoder.group,
        "BLOCK_LENGTH": packed_format.block_length,
        "VALUE_DTYPE": TRITON_DTYPES[value_dtype],
        # a fused multiply-add rounds once where the reference rounds twice
        "enable_fp_fusion": False,
    }


def _on(device: torch.device):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dequantize(packed_format, tensors, out, value_dtype, first):
    weight, special = _weight_arguments(packed_format, tensors, value_dtype)
    group = special["GROUP"]
    with _on(out.device):
        _dequantize[(triton.cdiv(out.numel(),
                                 DEQUANTIZE_TILE),)](*weight, out, out.numel(),
                                                     first * (packed_format.block_length // group),
                                                     GROUPS=DEQUANTIZE_TILE // group, **special)


def vector(packed_format, tensors, input, addend, out, value_dtype):
    _multiply(_vector, (), VECTOR_TILE, packed_format, tensors, input, addend, out, value_dtype)


def few_rows(packed_format, tensors, input, addend, out, value_dtype):
    stages = _decoder(packed_format).stages
    special = {"TOKENS": MAX_TOKENS} | ({"num_stages": stages} if stages else {})
    _multiply(_few_rows, (len(input),), ROWS_TILE, packed_format, tensors, input, addend, out,
              value_dtype, **special)


def _multiply(kernel, tokens, tile, packed_format, tensors, input, addend, out, value_dtype,
              **special):
    weight, more = _weight_arguments(packed_format, tensors, value_dtype)
    rows, columns = tile
    strides = (0, 0) if addend is None else addend.stride()
    with _on(out.device):
        kernel[(triton.cdiv(out.shape[1], rows),)](
            *weight, input, addend, out, *tokens, out.shape[1], input.shape[1], *strides,
            ROWS=rows, GROUPS=columns // more["GROUP"], **more, **special)


CODES = {"TILE": CODES_TILE, "SIDE": SIDE, "TINY": TINY, "LARGEST_CODE": LARGEST_CODE}


def int8_rows(packed_format, tensors, codes, scales, value_dtype, first):
    weight, special = _weight_arguments(packed_format, tensors, value_dtype)
    rows, columns = codes.shape
    with _on(codes.device):
        _int8_rows[(rows,)](*weight, side_matrix(codes.device), codes, scales,
                            first * packed_format.block_length // columns, columns, **CODES,
                            **special)


def int8_tokens(input, codes, scales):
    with _on(codes.device):
        _int8_tokens[(len(input),)](input, side_matrix(input.device), codes, scales, input.shape[1],
                                    **CODES)


@triton.jit
def _increment(numbers):
    at = numbers + tl.arange(0, 16)
    tl.store(at, tl.load(at) + 1)


def probe(device: torch.device):
    """Triton can be importable and still lack a compiler, a driver or support for the GPU."""
    numbers = torch.arange(16, dtype=torch.int32, device=device)
    with _on(device):
        _increment[(1,)](numbers)
    if numbers.tolist() != list(range(1, 17)):
        raise WrongResult("Triton's first kernel added wrongly")


_formats = frozenset(DECODERS)
BACKEND = Backend("triton", probe, (
    Kernel("dequantize", _formats, FLOATS, dequantize),
    Kernel("linear", _formats, FLOATS, vector, max_tokens=1),
    Kernel("linear", _formats, FLOATS, few_rows, min_tokens=2, max_tokens=MAX_TOKENS),
    Kernel("int8_rows", _formats, frozenset([torch.int8]), int8_rows),
    Kernel("int8_tokens", frozenset(), FLOATS, int8_tokens),
))
