"""Registers torch operators: their schema, implementation, and a fake that checks the operands.

torch calls the fakes while it compiles, to know shape and dtype of a result. One implementation
serves every device: `kernels` chooses the kernel by the weight's format and by what was decided
on the device.
"""
import math
from collections.abc import Callable

import torch
from torch._C._functorch import peek_interpreter_stack

from ..formats.base import FORMATS, Format

# input: (..., K) float. packed: the bytes of a weight of logical shape (rows, K) and, in some
# formats, its scales. bias: (rows,). down, ups, slices: `LowRank.operands`; without a branch None
# and empty. fast: see `layers.product`.
LINEAR_SCHEMA = (
    "linear(Tensor input, Tensor[] packed, Tensor? bias, str format, int rows, Tensor? down,"
    " Tensor[] ups, int[] slices, bool fast=False) -> Tensor")

_library = torch.library.Library("featherweight", "DEF")
_check = torch._check  # raises RuntimeError with the message, also where sizes are symbolic


def register(schema: str, run: Callable, fake: Callable) -> Callable:
    """Makes `torch.ops.featherweight.<name>`.

    Args:
        schema: in torch's syntax, with the name.
        run: the implementation. It gets the tensors of a packed weight contiguous, as the kernels
            and torch's reference read them.
        fake: checks the operands and returns an empty result.

    Returns:
        A function that computes what the operator of a layer (`LINEAR_SCHEMA`) does, past torch's
        dispatcher where nothing records or replaces torch's calls.
    """
    name = schema.partition("(")[0]
    before, has_packed, _ = schema.partition("Tensor[] packed")
    index = before.count(",")

    def run_contiguous(*operands):
        return run(*operands[:index], contiguous(operands[index]), *operands[index + 1:])

    _library.define(schema)
    _library.impl(name, run_contiguous if has_packed else run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"featherweight::{name}", fake, lib=_library)
    operator = getattr(torch.ops.featherweight, name)

    def call(input: torch.Tensor, packed: list[torch.Tensor], *operands):
        if (torch.compiler.is_compiling() or type(input) is not torch.Tensor
                or torch._C._len_torch_dispatch_stack()
                or torch._C._get_tracing_state() is not None
                or peek_interpreter_stack() is not None):
            return operator(input, packed, *operands)
        return run(input, contiguous(packed), *operands)

    return call


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors, copied where they are not contiguous: kernels get no strides."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            return [tensor.contiguous() for tensor in tensors]
    return tensors


def fake_linear(input, packed, bias, format, rows, down, ups, slices, fast=False):
    """Checks the operands of `linear` and returns its empty result."""
    _check(input.dtype.is_floating_point and input.ndim > 0,
           lambda: f"The input is {_describe(input)}; expected rows of floats.")
    columns = input.shape[-1]
    _check_weight(packed, format, rows * columns, f"a weight of {rows} x {columns}", whole=True)
    if bias is not None:
        _check(tuple(bias.shape) == (rows,) and bias.dtype == input.dtype,
               lambda: f"The bias is {_describe(bias)}; expected ({rows},) of {input.dtype}.")
    if down is None:
        _check(not ups and not slices,
               lambda: "A low-rank branch has up factors and no down factor.")
    else:
        _check_branch(input, rows, down, ups, slices)
    return input.new_empty((*input.shape[:-1], rows))


def fake_embedding(ids, packed, format, columns, dtype):
    """Checks the operands of `embedding` and returns its empty result."""
    _check(ids.dtype in (torch.int64, torch.int32),
           lambda: f"The ids are {_describe(ids)}; expected int64 or int32.")
    packed_format = _check_weight(packed, format, columns, f"a row of {columns} values")
    _check(columns % packed_format.block_length == 0,
           lambda: f"A row of {columns} values is not a multiple of the"
                   f" {packed_format.block_length} values in a block of {format}.")
    return _empty_result(packed, (*ids.shape, columns), dtype)


def fake_dequantize(packed, format, shape, dtype, first=0):
    """Checks the operands of `dequantize` and returns its empty result."""
    values = first * _format(format).block_length + math.prod(shape)
    what = f"a weight of {' x '.join(map(str, shape))}"
    if first:
        what += f" from block {first} on"
    _check_weight(packed, format, values, what)
    return _empty_result(packed, shape, dtype)


def _check_branch(input, rows, down, ups, slices):
    for factor in (down, *ups):
        _check(factor.ndim == 2 and factor.dtype == input.dtype,
               lambda: f"A low-rank factor is {_describe(factor)}; expected a matrix of"
                       f" {input.dtype}.")
    _check(down.shape[1] == input.shape[-1],
           lambda: f"The down factor is for {down.shape[1]} input features, the input has"
                   f" {input.shape[-1]}.")
    _check(len(slices) == 4 * len(ups),
           lambda: f"{len(ups)} up factors have {len(slices)} numbers for their slices; expected"
                   " four per factor.")
    for index, up in enumerate(ups):
        row, row_end, rank, rank_end = slices[4 * index:4 * index + 4]
        _check(0 <= row <= row_end <= rows and 0 <= rank <= rank_end <= down.shape[0],
               lambda: f"A slice has rows {row} to {row_end} of {rows} and ranks {rank} to"
                       f" {rank_end} of {down.shape[0]}.")
        _check(tuple(up.shape) == (row_end - row, rank_end - rank),
               lambda: f"An up factor is {_describe(up)}, its slice has {row_end - row} rows and"
                       f" {rank_end - rank} ranks.")


def _format(name: str) -> Format:
    _check(name in FORMATS, lambda: f"There is no packed format {name}.")
    return FORMATS[name]


def _check_weight(packed, format: str, values: int, what: str, whole: bool = False) -> Format:
    """Checks that the tensors of a packed weight hold enough values.

    Args:
        packed: its bytes and, in some formats, its scales.
        format: name of the format.
        values: values they must hold.
        what: describes these in a message.
        whole: whether the tensors must end with the block of the last value.
    """
    packed_format = _format(format)
    expected = 1 + len(packed_format.qparams)
    _check(len(packed) == expected,
           lambda: f"A weight in {format} has {expected} tensors, not {len(packed)}.")
    data = packed[0]
    _check(data.dtype == torch.uint8,
           lambda: f"The bytes of a weight in {format} are {_describe(data)}; expected uint8.")
    length, size = packed_format.block_length, packed_format.block_bytes
    count = data.numel() * length // size
    fits = data.numel() == -(-values * size // length) if whole else count >= values
    _check(fits, lambda: f"{data.numel()} bytes of {format} hold {count} values, not {what}.")
    blocks = -(-values // length)
    for scales, qparam in zip(packed[1:], packed_format.qparams):
        _check(scales.dtype == qparam.dtype,
               lambda: f"The scales of a weight in {format} are {_describe(scales)}; expected"
                       f" {str(qparam.dtype).removeprefix('torch.')}.")
        needed = qparam.length(blocks)
        _check(len(scales) == needed if whole else len(scales) >= needed,
               lambda: f"{len(scales)} scales of {format} were given for {what}, which has"
                       f" {blocks} blocks.")
    return packed_format


def _empty_result(packed, shape, dtype: torch.dtype) -> torch.Tensor:
    _check(dtype.is_floating_point,
           lambda: f"A weight is dequantized to a float dtype, not to {dtype}.")
    return torch.empty(shape, dtype=dtype, device=packed[0].device)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
