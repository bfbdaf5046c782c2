"""Products with packed weights, as torch operators: `linear`, `embedding`, `dequantize`.

They run on every device, with a kernel of `kernels` where there is one and otherwise in torch, the
reference that the kernels are compared with. They are registered with torch, so that
`torch.compile(fullgraph=True)` compiles packed layers.

`linear` multiplies by the values that the weight's format defines. `fast` is less exact: by
comfy_kitchen's kernels (`fast_by_kitchen`) or a CPU's int8 units (`fast_on_cpu`) where these take
format, device and number of tokens, and exactly elsewhere.
"""
from collections.abc import Callable, Generator
from typing import Any

import torch
from comfy_kitchen.tensor import register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from .. import kernels, stochastic_rounding
from ..formats.base import FORMATS, Format
from ..formats.low_rank_and_joined import Composite
from ..kernels import torch_registration
from ..low_rank import LowRank, dense_linear
from ..tensor.packed_layout import (
    PackedLayout,
    QuantizedTensor,
    is_packed,
    packed_tensors,
    plain_dtype_of,
    plain_tensor,
)
from ..tensor.packed_tensor import PackedTensor
from ..tensor.row_slicing import rows_are_whole_blocks
from . import cpu_linear, fast_by_kitchen, fast_on_cpu, joint_product, workspace

# On a CPU a slice of the weight that stays in the cache is written and read faster, and a product
# takes up to half as long again where its rows are no multiple of what it handles together.
CACHED_BYTES, ROW_BLOCK = 6 << 20, 64
MIN_ROWS = 256  # of long rows, as of convolutions: with fewer the input is read too often
# A convolution also copies each slice, in the order that it needs: for this many channels at once.
CONVOLUTION_BYTES, CHANNEL_BLOCK = 16 << 20, 16
CORE_CACHE_BYTES = 1 << 20  # of values on their way to another order


def _linear(input: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, format: str,
            rows: int, down: torch.Tensor | None, ups: list[torch.Tensor],
            slices: list[int], fast: bool = False) -> torch.Tensor:
    flat = input.reshape(-1, input.shape[-1])
    low_rank = None if down is None else LowRank.from_operands(down, ups, slices)
    packed_format, out = FORMATS[format], None
    if fast:
        out = fast_by_kitchen.multiply(flat, packed_format, packed, rows, bias, low_rank)
    if out is None:
        if isinstance(packed_format, Composite):
            packed_format, packed, own = packed_format.without_low_rank(packed)
            if own is not None:
                low_rank = own.to(flat).and_also(low_rank, rows)
        operands = flat, packed_format, packed, rows, bias, low_rank
        if fast:
            out = fast_on_cpu.multiply(*operands)
        # The low-rank branch is part of the large product's sum, which is rounded once: added after
        # the rounding, a weak LoRA would be lost. Adding the bias rounds too, so it comes last.
        if out is None:
            out = _by_kernel(*operands)
        if out is None:
            out = _by_torch(*operands)
    return out.view(*input.shape[:-1], rows)


def _by_kernel(input: torch.Tensor, packed_format: Format, packed: list[torch.Tensor],
               rows: int, bias: torch.Tensor | None,
               low_rank: LowRank | None) -> torch.Tensor | None:
    """Computes `_linear` with a kernel that dequantises as it multiplies; None: there is none."""
    tokens, columns = input.shape
    if not kernels.multiplies(packed_format, columns):
        return None
    run = kernels.find("linear", input.device, packed_format, input.dtype, tokens)
    if run is None:
        return None
    addend = None if bias is None else bias.expand(tokens, rows)
    if low_rank is not None:
        addend = low_rank.product(input, rows)
    out = input.new_empty((tokens, rows))
    run(packed_format, packed, input.contiguous(), addend, out)
    if low_rank is not None and bias is not None:
        out += bias
    return out


def _by_torch(input: torch.Tensor, packed_format: Format, packed: list[torch.Tensor],
              rows: int, bias: torch.Tensor | None, low_rank: LowRank | None) -> torch.Tensor:
    """Computes `_linear` in torch, W dequantised in slices of rows."""
    tokens, columns = input.shape
    if low_rank is not None and joint_product.is_smaller(input, packed_format, rows,
                                                         bias is not None, low_rank):
        return joint_product.linear(input, packed_format, packed, rows, bias, low_rank)
    by_onednn = cpu_linear.takes(input)
    multiply = torch.nn.functional.linear
    if by_onednn:
        input, multiply = input.contiguous(), cpu_linear.linear
    if packed_format.plain_dtype == input.dtype:
        weight = packed[0].view(input.dtype).view(rows, columns)
        if low_rank is None:
            return multiply(input, weight, bias)
        out = low_rank.product(input, rows).addmm_(input, weight.t())
        return out if bias is None else out.add_(bias)
    limit, row_bytes = workspace.workspace_bytes(input.device), columns * input.dtype.itemsize
    if input.device.type == "cpu":
        few_rows = min(MIN_ROWS * row_bytes, CONVOLUTION_BYTES)
        limit = min(limit, max(CACHED_BYTES, few_rows))
    multiple = ROW_BLOCK if limit >= ROW_BLOCK * row_bytes else 1
    step = min(rows, workspace.rows_within(limit, packed_format, columns, row_bytes, multiple))
    with workspace.workspace(input.device) as take:

        def dequantize_slice(start: int, stop: int) -> torch.Tensor:
            out = take((stop - start, columns), input.dtype)
            first = start * columns // packed_format.block_length
            return kernels.dequantize_into(packed_format, packed, out, first)

        if low_rank is None and step == rows:
            return multiply(input, dequantize_slice(0, rows), bias)
        hidden = None if low_rank is None else input @ low_rank.down.t()
        out = input.new_empty((tokens, rows))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            part, weight = out[:, start:stop], dequantize_slice(start, stop)
            if low_rank is not None and hidden is not None:
                low_rank.expand(hidden, part, start)  # now, for the cache
                if by_onednn and input.dtype == torch.float32:
                    part += multiply(input, weight)
                else:
                    part.addmm_(input, weight.t())
                if bias is not None:
                    part += bias[start:stop]
            elif by_onednn:
                part.copy_(multiply(input, weight, None if bias is None else bias[start:stop]))
            elif bias is None:
                torch.mm(input, weight.t(), out=part)
            else:
                torch.addmm(bias[start:stop], input, weight.t(), out=part)
    return out


def _embedding(ids: torch.Tensor, packed: list[torch.Tensor], format: str, columns: int,
               dtype: torch.dtype) -> torch.Tensor:
    packed_format = FORMATS[format]
    out = torch.empty((*ids.shape, columns), dtype=dtype, device=packed[0].device)
    rows = packed_format.rows(packed, columns, ids.flatten())
    return kernels.dequantize_into(packed_format, rows, out)


def _dequantize(packed: list[torch.Tensor], format: str, shape: list[int], dtype: torch.dtype,
                first: int = 0) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed[0].device)
    if out.device.type == "cpu":  # outside of steps too: files are converted and compared
        kernels.decide(out.device, [("dequantize", within, dtype)
                                    for within in FORMATS[format].formats_within()])
    return kernels.dequantize_into(FORMATS[format], packed, out, first)


_linear_operator = torch_registration.register(
    torch_registration.LINEAR_SCHEMA, _linear, torch_registration.fake_linear)
torch_registration.register(
    "embedding(Tensor ids, Tensor[] packed, str format, int columns, ScalarType dtype) -> Tensor",
    _embedding, torch_registration.fake_embedding)
torch_registration.register(
    "dequantize(Tensor[] packed, str format, int[] shape, ScalarType dtype, int first=0)"
    " -> Tensor", _dequantize, torch_registration.fake_dequantize)


def linear(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None,
           low_rank: LowRank | None = None, fast: bool = False) -> torch.Tensor:
    """Computes `input @ weight.T + bias` plus a low-rank branch, the weight dequantised in slices.

    Args:
        input: (..., K) float.
        weight: packed, logical shape (N, K), on the same device.
        bias: (N,) in the dtype of `input`, or None.
        low_rank: in the dtype of `input`, or None.
        fast: multiply less exactly where that is faster and no gradient is needed.

    Returns:
        (..., N) in the dtype of `input`.

    Raises:
        RuntimeError: the last dimension of `input` is not K.
    """
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"A layer of {weight.shape[1]} input features was given {input.shape[-1]}: the model"
            " and its input (often the text encoder's output) do not belong together.")
    if needs_gradient(input, bias):
        # a copy may be overwritten before the gradient is computed
        if isinstance(weight, torch.nn.Parameter) and not torch.compiler.is_compiling():
            return _Linear.apply(input, bias, weight, low_rank)
        return dense_linear(input, dequantize(weight, input.dtype), bias, low_rank)
    return _linear_operator(*operands(input, weight, bias, low_rank), fast)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Returns whether autograd is to compute a gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors)


class _Linear(torch.autograd.Function):
    """The product of `linear` with the gradients of input and bias, for which the weight is
    dequantised again: no dense weight is kept for them."""

    @staticmethod
    def forward(ctx, input: torch.Tensor, bias: torch.Tensor | None, weight: PackedTensor,
                low_rank: LowRank | None) -> torch.Tensor:
        ctx.weight, ctx.low_rank = weight, low_rank
        return torch.ops.featherweight.linear(*operands(input, weight, bias, low_rank))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        flat = grad.reshape(-1, grad.shape[-1])
        input_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            dense = dequantize(ctx.weight, flat.dtype)
            if ctx.low_rank is None:
                input_grad = flat @ dense
            else:
                input_grad = ctx.low_rank.transposed_product(flat).addmm_(flat, dense)
            input_grad = input_grad.view(*grad.shape[:-1], dense.shape[1])
        if ctx.needs_input_grad[1]:
            bias_grad = flat.sum(0)
        return input_grad, bias_grad, None, None


def operands(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None,
             low_rank: LowRank | None) -> tuple:
    """Returns the arguments of `torch_registration.LINEAR_SCHEMA` but the last; see `linear`."""
    branch = (None, (), ()) if low_rank is None else low_rank.operands
    return (
        input,
        packed_tensors(weight),
        bias,
        weight._params.format.name,
        weight.shape[0],
        *branch,
    )


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _comfy_linear(_, args, kwargs):
    """Runs `torch.nn.functional.linear` in inference mode.

    The host calls it with an embedding table to generate text.
    """
    input, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if isinstance(input, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        dense: Any = dequantize_args((input, weight, bias))
        return torch.nn.functional.linear(*dense)
    return linear(input, weight, bias)


def embedding(ids: torch.Tensor, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Looks up rows of a packed table; only these rows are dequantised.

    Args:
        ids: integers of any shape, on the table's device.
        weight: packed, logical shape (rows, K).
        dtype: of the result.

    Returns:
        (*ids.shape, K).
    """
    packed_format = weight.params.format
    if not rows_are_whole_blocks(weight):
        return torch.nn.functional.embedding(ids, dequantize(weight, dtype))
    return torch.ops.featherweight.embedding(ids, packed_tensors(weight), packed_format.name,
                                             weight.shape[1], dtype)


def dequantize(weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the dense weight in `dtype`, rounded once from float32."""
    name = weight.params.format.name
    return torch.ops.featherweight.dequantize(packed_tensors(weight), name, list(weight.shape),
                                              dtype)


def plain_values(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Returns a read-only view of a weight whose bytes are numbers of `dtype`, else None."""
    return plain_tensor(weight) if is_packed(weight) and plain_dtype_of(weight) == dtype else None


def fits_workspace(weight: PackedTensor, input: torch.Tensor, reordered: bool = False) -> bool:
    """Returns whether to dequantise a weight into the workspace.

    That is so on a CPU, where no gradient needs the values later.

    Args:
        weight: packed.
        input: of the layer.
        reordered: whether values that need no dequantising are copied there too.
    """
    return (
        input.device.type == "cpu"
        and (reordered or plain_values(weight, input.dtype) is None)
        and not torch.compiler.is_compiling()
        and not needs_gradient(input)
    )


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values of a tensor that may be packed, in its logical dtype."""
    return dequantize(tensor, tensor.dtype) if is_packed(tensor) else tensor


def dequantized_slices(weight: PackedTensor, dtype: torch.dtype, whole: bool = False,
                       channels_last: bool = False
                       ) -> Generator[tuple[slice, torch.Tensor], None, None]:
    """Yields a weight in slices of rows, each in the workspace; see `fits_workspace`.

    Args:
        weight: packed, of any shape; a row is all that has the same first index.
        dtype: of the values.
        whole: yield all rows at once.
        channels_last: yield the weight of a 2-D convolution in memory format `channels_last`.

    Yields:
        (rows, their dense values, valid until the next slice is taken).
    """
    packed_format, shape = weight.params.format, weight.shape
    columns = shape[1:].numel()
    step = shape[0] if whole else workspace.rows_within(
        CONVOLUTION_BYTES, packed_format, columns, columns * dtype.itemsize, CHANNEL_BLOCK)
    tensors = packed_tensors(weight)
    with workspace.workspace(weight.device) as take:
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            first = start * columns // packed_format.block_length
            if channels_last:
                count, channels, height, width = rows.stop - start, *shape[1:]
                out = take((count, height, width, channels), dtype)
                _dequantize_channels_last(packed_format, tensors, out.view(count, -1, channels),
                                          first)
                yield rows, out.permute(0, 3, 1, 2)
            else:
                out = take((rows.stop - start, *shape[1:]), dtype)
                yield rows, kernels.dequantize_into(packed_format, tensors, out, first)


def _dequantize_channels_last(packed_format: Format, tensors: list[torch.Tensor],
                              out: torch.Tensor, first: int):
    """Dequantises the weight of a convolution into (rows, taps, channels), from block `first` on.

    Its blocks are in the order (rows, channels, taps).
    """
    rows, taps, channels = out.shape
    columns = taps * channels
    step = min(rows, workspace.rows_within(CORE_CACHE_BYTES, packed_format, columns,
                                           columns * out.itemsize))
    plain_dtype = packed_format.plain_dtype
    scratch = out.new_empty(step * columns if plain_dtype is None else 0)
    for start in range(0, rows, step):
        part = out[start:start + step]
        block = first + start * columns // packed_format.block_length
        if plain_dtype is None:
            values = kernels.dequantize_into(packed_format, tensors, scratch[:part.numel()],
                                             block)
        else:
            values = tensors[0].view(-1).view(plain_dtype)[block:block + part.numel()]
        kernels.cast_channels_last(values.view(-1, channels, taps), part)


def dequantize_rows(weight: PackedTensor, dtype: torch.dtype,
                    change: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Returns the dense weight, changed in slices of float32 rows before stochastic rounding.

    Args:
        weight: packed.
        dtype: of the result.
        change: (float32 rows, index of the first) -> the changed rows.
    """
    packed_format, shape = weight.params.format, weight.shape
    columns = shape[1:].numel()
    row_bytes = columns * torch.float32.itemsize
    step = min(
        shape[0],
        workspace.rows_within(workspace.CPU_WORKSPACE_BYTES, packed_format, columns, row_bytes))
    tensors = packed_tensors(weight)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    for start in range(0, shape[0], step):
        rows = torch.ops.featherweight.dequantize(tensors, packed_format.name,
                                                  [min(step, shape[0] - start), *shape[1:]],
                                                  torch.float32,
                                                  start * columns // packed_format.block_length)
        out[start:start + len(rows)] = stochastic_rounding.stochastic_round(
            change(rows, start), dtype)
    return out
