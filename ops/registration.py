"""How operators become torch's: their schema, what runs, and a fake that checks its operands and
says what is wrong with them.

torch asks the fakes what a result looks like while it compiles. One implementation serves every
device: which kernel runs is decided by the weight's format and what proved right on the device, in
`kernels`.
"""
import math
from collections.abc import Callable

import torch

from .format import FORMATS, Format

# input: (..., K) float. packed: what a weight of logical shape (rows, K) holds, its bytes and, in
# some formats, its scales. bias: (rows,). value_dtype: see `Format.dequantize_into`. down, ups,
# slices: `LowRank.operands`; without a branch None and empty.
LINEAR_SCHEMA = (
    "(Tensor input, Tensor[] packed, Tensor? bias, str format, int rows, ScalarType? value_dtype,"
    " Tensor? down, Tensor[] ups, int[] slices) -> Tensor")

_library = torch.library.Library("featherweight", "DEF")
_check = torch._check  # raises RuntimeError with the sentence, also where sizes are still symbols


def register(schema: str, run: Callable, fake: Callable):
    """Make `torch.ops.featherweight.<name>`. schema: as torch writes it, with the name. fake: `run`
    without its arithmetic.

    `run` gets the tensors of a packed weight contiguous, as the kernels and torch's reference read
    them.
    """
    name, (before, has_packed, _) = schema.partition("(")[0], schema.partition("Tensor[] packed")
    index = before.count(",")

    def run_contiguous(*operands):
        return run(*operands[:index], contiguous(operands[index]), *operands[index + 1:])

    _library.define(schema)
    _library.impl(name, run_contiguous if has_packed else run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"featherweight::{name}", fake, lib=_library)


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same; those that lie in pieces are copied, because kernels get no strides."""
    return [tensor.contiguous() for tensor in tensors]


def fake_linear(input, packed, bias, format, rows, value_dtype, down, ups, slices):
    _check(input.dtype.is_floating_point and input.ndim > 0,
           lambda: f"The input is {_describe(input)}, not of floats in rows.")
    columns = input.shape[-1]
    _check_weight(packed, format, rows * columns, f"a weight of {rows} x {columns}", whole=True)
    _check_value_dtype(value_dtype)
    if bias is not None:
        _check(tuple(bias.shape) == (rows,) and bias.dtype == input.dtype,
               lambda: f"The bias is {_describe(bias)}, not ({rows},) of {input.dtype}.")
    if down is None:
        _check(not ups and not slices,
               lambda: "A low-rank branch has up factors and no down factor.")
    else:
        _check_branch(input, rows, down, ups, slices)
    return input.new_empty((*input.shape[:-1], rows))


def fake_embedding(ids, packed, format, columns, dtype):
    _check(ids.dtype in (torch.int64, torch.int32),
           lambda: f"The ids are {_describe(ids)}, not of int64 or int32.")
    packed_format = _check_weight(packed, format, columns, f"a row of {columns} values")
    _check(
        columns % packed_format.block_length == 0, lambda:
        f"A row of {columns} values is not whole blocks of {packed_format.block_length}, as"
        f" {format} has them."
    )
    return _dequantized(packed, (*ids.shape, columns), dtype)


def fake_dequantize(packed, format, shape, dtype, value_dtype, first=0):
    values = first * _format(format).block_length + math.prod(shape)
    behind = f" behind {first} blocks" if first else ""
    _check_weight(packed, format, values, f"a weight of {' x '.join(map(str, shape))}{behind}")
    _check_value_dtype(value_dtype)
    return _dequantized(packed, shape, dtype)


def _check_branch(input, rows, down, ups, slices):
    for factor in (down, *ups):
        _check(factor.ndim == 2 and factor.dtype == input.dtype,
               lambda: f"A low-rank factor is {_describe(factor)}, not a matrix of {input.dtype}.")
    _check(
        down.shape[1] == input.shape[-1], lambda:
        f"The down factor is for {down.shape[1]} input features, the input has {input.shape[-1]}.")
    _check(
        len(slices) == 4 * len(ups), lambda:
        f"{len(ups)} up factors have {len(slices)} numbers for their slices, not four each.")
    for index, up in enumerate(ups):
        row, row_end, rank, rank_end = slices[4 * index:4 * index + 4]
        _check(
            0 <= row <= row_end <= rows and 0 <= rank <= rank_end <= down.shape[0], lambda:
            f"A slice has rows {row} to {row_end} of {rows} and ranks {rank} to {rank_end} of"
            f" {down.shape[0]}."
        )
        _check(
            tuple(up.shape) == (row_end - row, rank_end - rank), lambda:
            f"An up factor is {_describe(up)}, its slice has {row_end - row} rows and"
            f" {rank_end - rank} ranks."
        )


def _format(name: str) -> type[Format]:
    _check(name in FORMATS, lambda: f"There is no packed format {name}.")
    return FORMATS[name]


def _check_weight(packed, format: str, values: int, what: str, whole: bool = False) -> type[Format]:
    """That the tensors of a packed weight hold at least so many values, or, if `whole`, no more
    than their blocks need."""
    packed_format = _format(format)
    expected = 2 if packed_format.scales_apart else 1
    _check(
        len(packed) == expected,
        lambda: f"A weight in {format} has {expected} tensors, not {len(packed)}.")
    _check(packed[0].dtype == torch.uint8,
           lambda: f"The bytes of a weight in {format} are {_describe(packed[0])}, not of uint8.")
    length, size = packed_format.block_length, packed_format.block_bytes
    held = packed[0].numel() * length // size
    fits = packed[0].numel() == -(-values * size // length) if whole else held >= values
    _check(fits, lambda: f"{packed[0].numel()} bytes of {format} hold {held} values, not {what}.")
    if packed_format.scales_apart:
        scales, blocks = packed[1], -(-values // length)
        _check(
            scales.dtype == torch.float32,
            lambda: f"The scales of a weight in {format} are {_describe(scales)}, not of float32.")
        _check(
            len(scales) == blocks if whole else len(scales) >= blocks, lambda:
            f"{len(scales)} scales of {format} are not those of {what}, which has {blocks} blocks.")
    return packed_format


def _check_value_dtype(dtype: torch.dtype | None):
    _check(dtype is None or dtype.is_floating_point,
           lambda: f"Values are rounded to a float dtype, not to {dtype}.")


def _dequantized(packed, shape, dtype: torch.dtype) -> torch.Tensor:
    _check(dtype.is_floating_point,
           lambda: f"A weight is dequantised to a float dtype, not to {dtype}.")
    return torch.empty(shape, dtype=dtype, device=packed[0].device)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
