"""Registers torch operators: their schema, implementation, and a fake of it.

torch calls the fakes while it compiles, to know shape and dtype of a result. One implementation
serves every device: `kernels` chooses the kernel by the weight's format and by what was decided
on the device.
"""
from collections.abc import Callable

import torch
from torch._C._functorch import peek_interpreter_stack

# input: (..., K) float. packed: the bytes of a weight of logical shape (rows, K) and, in some
# formats, its scales. bias: (rows,). down, ups, slices: `LowRank.operands`; without a branch None
# and empty. fast: see `layers.product`.
LINEAR_SCHEMA = (
    "linear(Tensor input, Tensor[] packed, Tensor? bias, str format, int rows, Tensor? down,"
    " Tensor[] ups, int[] slices, bool fast=False) -> Tensor")

_library = torch.library.Library("featherweight", "DEF")


def register(schema: str, run: Callable, fake: Callable) -> Callable:
    """Makes `torch.ops.featherweight.<name>`.

    Args:
        schema: in torch's syntax, with the name.
        run: the implementation. It gets the tensors of a packed weight contiguous, as the kernels
            and torch's reference read them.
        fake: returns an empty result.

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
    """Returns an empty result of `linear`."""
    return input.new_empty((*input.shape[:-1], rows))


def fake_embedding(ids, packed, format, columns, dtype):
    """Returns an empty result of `embedding`."""
    return torch.empty((*ids.shape, columns), dtype=dtype, device=packed[0].device)


def fake_dequantize(packed, format, shape, dtype, first=0):
    """Returns an empty result of `dequantize`."""
    return torch.empty(shape, dtype=dtype, device=packed[0].device)
