"""Products with packed weights, as torch operators: `linear`, `embedding`, `dequantize`.

They run on every device, by a kernel of `kernels` where one serves and otherwise by torch, whose
results the kernels are held to. Registered with torch, so `torch.compile(fullgraph=True)` takes a
packed layer as it is.
"""
import contextlib

import torch
from comfy_kitchen.tensor import register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from . import kernels, registration, stochastic_rounding, workspace
from .format import FORMATS, Format
from .low_rank import LowRank, dense_linear
from .packed_layout import PackedLayout, QuantizedTensor, is_packed, packed_tensors
from .packed_tensor import PackedTensor

# On a CPU with few rows of input most of the time goes into the weight, and a slice that stays in
# the cache is read faster.
FEW_TOKENS, CACHED_BYTES = 128, 16 << 20


def _linear(input: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, format: str,
            rows: int, value_dtype: torch.dtype | None, down: torch.Tensor | None,
            ups: list[torch.Tensor], slices: list[int]) -> torch.Tensor:
    flat = input.reshape(-1, input.shape[-1])
    low_rank = LowRank.from_operands(down, ups, slices)
    # The low-rank branch goes into the sum of the large product, which is rounded once: added to
    # something already rounded a weak LoRA would be lost, in the bias too. So the bias comes last.
    added = None if low_rank is None else low_rank.product(flat, rows)
    weight = FORMATS[format], packed, rows, value_dtype
    out = _by_kernel(flat, *weight, bias, added)
    if out is None:
        out = _by_torch(flat, *weight, bias, added)
    if added is not None and bias is not None:
        out += bias
    return out.view(*input.shape[:-1], rows)


def _by_kernel(input: torch.Tensor, packed_format: type[Format], packed: list[torch.Tensor],
               rows: int, value_dtype: torch.dtype | None, bias: torch.Tensor | None,
               added: torch.Tensor | None) -> torch.Tensor | None:
    """`input W^T + added`, or `+ bias` where nothing is added, by a kernel that dequantises as it
    multiplies; None without one."""
    tokens, columns = input.shape
    if columns % packed_format.block_length:
        return None
    run = kernels.find("linear", input.device, packed_format, input.dtype, value_dtype, tokens)
    if run is None:
        return None
    addend = bias.expand(tokens, rows) if added is None and bias is not None else added
    out = input.new_empty((tokens, rows))
    run(packed_format, packed, input.contiguous(), addend, out, value_dtype)
    return out


def _by_torch(input: torch.Tensor, packed_format: type[Format], packed: list[torch.Tensor],
              rows: int, value_dtype: torch.dtype | None, bias: torch.Tensor | None,
              added: torch.Tensor | None) -> torch.Tensor:
    """`input W^T + added`, or `+ bias` where nothing is added, W dequantised slice by slice of its
    rows. Overwrites `added`."""
    tokens, columns = input.shape
    if packed_format.plain_dtype == input.dtype:
        weight = packed[0].view(input.dtype).view(rows, columns)
        return (
            torch.nn.functional.linear(input, weight, bias)
            if added is None
            else added.addmm_(input, weight.t())
        )
    limit = workspace.workspace_bytes(input.device)
    if input.device.type == "cpu" and tokens < FEW_TOKENS:
        limit = min(limit, CACHED_BYTES)
    step = min(rows,
               workspace.rows_within(limit, packed_format, columns, columns * input.dtype.itemsize))
    with workspace.workspace(input.device) as take:

        def dequantized(start: int, stop: int) -> torch.Tensor:
            weight, first = (
                take((stop - start, columns), input.dtype),
                start * columns // packed_format.block_length,
            )
            return kernels.dequantize_into(packed_format, packed, weight, value_dtype, first)

        if added is None and step == rows:
            return torch.nn.functional.linear(input, dequantized(0, rows), bias)
        out = input.new_empty((tokens, rows)) if added is None else added
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            part = out[:, start:stop]
            if added is not None:
                part.addmm_(input, dequantized(start, stop).t())
            elif bias is None:
                torch.mm(input, dequantized(start, stop).t(), out=part)
            else:
                torch.addmm(bias[start:stop], input, dequantized(start, stop).t(), out=part)
    return out


def _embedding(ids: torch.Tensor, packed: list[torch.Tensor], format: str, columns: int,
               dtype: torch.dtype) -> torch.Tensor:
    packed_format = FORMATS[format]
    out = torch.empty((*ids.shape, columns), dtype=dtype, device=packed[0].device)
    return kernels.dequantize_into(packed_format, packed_format.rows(packed, columns,
                                                                     ids.flatten()), out)


def _dequantize(packed: list[torch.Tensor], format: str, shape: list[int], dtype: torch.dtype,
            value_dtype: torch.dtype | None, first: int = 0) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed[0].device)
    return kernels.dequantize_into(FORMATS[format], packed, out, value_dtype, first)


registration.register(f"linear{registration.LINEAR_SCHEMA}", _linear, registration.fake_linear)
registration.register(
    "embedding(Tensor ids, Tensor[] packed, str format, int columns, ScalarType dtype) -> Tensor",
    _embedding, registration.fake_embedding)
registration.register(
    "dequantize(Tensor[] packed, str format, int[] shape, ScalarType dtype, ScalarType?"
    " value_dtype, int first=0) -> Tensor", _dequantize, registration.fake_dequantize)


def linear(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None,
           value_dtype: torch.dtype | None = None, low_rank: LowRank | None = None) -> torch.Tensor:
    """`input @ weight.T + bias` in the dtype of `input`, the weight dequantised slice by slice,
    plus a low-rank branch.

    input: (..., K) float. weight: packed, logical shape (N, K), same device. bias: (N,) in input's
    dtype or None.
    value_dtype: round the dequantised values to this dtype first (None: straight to input's).
    low_rank: in input's dtype. Returns (..., N).
    """
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"A layer of {weight.shape[1]} input features was given {input.shape[-1]}: the model"
            " and what is fed to it (often the text encoder's output) do not belong together.")
    if input.requires_grad and torch.is_grad_enabled():
        return dense_linear(input, dequantize(weight, input.dtype, value_dtype), bias, low_rank)
    return torch.ops.featherweight.linear(*operands(input, weight, bias, value_dtype, low_rank))


def operands(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None,
             value_dtype: torch.dtype | None, low_rank: LowRank | None) -> tuple:
    """What `registration.LINEAR_SCHEMA` takes."""
    branch = (None, (), ()) if low_rank is None else low_rank.operands
    return (
        input,
        packed_tensors(weight),
        bias,
        weight.layout_cls.format.__name__,
        weight.shape[0],
        value_dtype,
        *branch,
    )


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _comfy_linear(_, args, kwargs):
    """`torch.nn.functional.linear` in inference mode, as where the host multiplies with an
    embedding table to write text."""
    input, weight, bias = (*args, None)[:3]
    if isinstance(input, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        return torch.nn.functional.linear(*dequantize_args((input, weight, bias)))
    return linear(input, weight, bias)


def embedding(ids: torch.Tensor, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a packed table: only the rows asked for are dequantised.

    ids: integer, any shape, on the table's device. weight: packed, logical shape (rows, K). Returns
    (*ids.shape, K) in `dtype`.
    """
    packed_format = weight.layout_cls.format
    if weight.shape[1] % packed_format.block_length:  # blocks cross rows
        return torch.nn.functional.embedding(ids, dequantize(weight, dtype))
    return torch.ops.featherweight.embedding(ids, packed_tensors(weight), packed_format.__name__,
                                             weight.shape[1], dtype)


def dequantize(weight: PackedTensor, dtype: torch.dtype,
               value_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole dense weight in `dtype`, rounded once from float32 (or first to `value_dtype`)."""
    return torch.ops.featherweight.dequantize(packed_tensors(weight),
                                              weight.layout_cls.format.__name__, list(weight.shape),
                                              dtype, value_dtype)


def plain_values(weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The values of a weight whose bytes are numbers of `dtype`, as they lie, not to be written to;
    None of all others."""
    if not is_packed(weight) or weight.layout_cls.format.plain_dtype != dtype:
        return None
    return packed_tensors(weight)[0].view(dtype).view(weight.shape)


def fits_workspace(weight: PackedTensor, input: torch.Tensor) -> bool:
    """Whether a weight is best taken from the scratch: on a CPU, where it must be dequantised and
    no gradient needs it later."""
    return (
        input.device.type == "cpu"
        and plain_values(weight, input.dtype) is None
        and not torch.compiler.is_compiling()
        and not (input.requires_grad and torch.is_grad_enabled())
    )


@contextlib.contextmanager
def dequantize_into_workspace(weight: PackedTensor, dtype: torch.dtype,
                              value_dtype: torch.dtype | None = None):
    """Inside this block: the whole dense weight in `dtype`, without fresh pages for it; see
    `dequantize` and `fits_workspace`."""
    with workspace.workspace(weight.device) as take:
        yield kernels.dequantize_into(weight.layout_cls.format, packed_tensors(weight),
                                      take(weight.shape, dtype), value_dtype)


def dequantize_rows(weight: PackedTensor, dtype: torch.dtype, change,
                    value_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole dense weight in `dtype`, each slice of its rows handed to `change` in float32
    before it is rounded, dithered.

    change(rows, start): float32 rows of the weight from row `start` on -> the rows to keep.
    """
    packed_format, shape = weight.layout_cls.format, weight.shape
    columns = shape[1:].numel()
    row_bytes = columns * torch.float32.itemsize
    step = min(
        shape[0],
        workspace.rows_within(workspace.CPU_WORKSPACE_BYTES, packed_format, columns, row_bytes))
    tensors = packed_tensors(weight)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    for start in range(0, shape[0], step):
        rows = torch.ops.featherweight.dequantize(tensors, packed_format.__name__,
                                                  [min(step, shape[0] - start), *shape[1:]],
                                                  torch.float32, value_dtype,
                                                  start * columns // packed_format.block_length)
        out[start:start + len(rows)] = stochastic_rounding.stochastic_round(
            change(rows, start), dtype)
    return out
