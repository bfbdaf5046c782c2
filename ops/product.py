"""Arithmetic on packed weights, as torch operators: `linear`, `embedding`, `unpack`.

Everything here is plain torch, runs on every device and is the reference for faster kernels. The operators are registered
with torch, so `torch.compile(fullgraph=True)` takes a packed layer as it is.
"""
import contextlib
import math
import threading
import weakref

import torch
from comfy_kitchen.tensor import register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from . import kernels, rounding
from .format import FORMATS, Format
from .tensor import PackedLayout, QuantizedTensor, is_packed, packed_tensors

# A weight is unpacked into at most this many bytes at a time. Larger weights go through the product in slices of rows.
SCRATCH_BYTES = 64 << 20
DEVICE_SCRATCH_BYTES = 256 << 20
# On a CPU with few rows of input most of the time goes into the weight, and a slice that stays in the cache is read faster.
FEW_TOKENS, CACHED_BYTES = 128, 16 << 20


class Scratch:
    """One reused CPU buffer for unpacked weights. Fresh pages for every weight would cost more than unpacking it.

    Elsewhere torch's caching allocator does the same, and gives the memory back when the host asks for it.
    """

    def __init__(self):
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.lock = threading.Lock()  # held while a weight in the buffer is in use

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, valid until the next call."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes].view(dtype).view(shape)

    def __deepcopy__(self, memo):
        return self  # a copied layer shares it like any other


_scratches = weakref.WeakValueDictionary()


def shared_scratch() -> Scratch:
    """The scratch of all layers. It lives as long as somebody holds it: each packed layer does."""
    scratch = _scratches.get("cpu")
    if scratch is None:
        scratch = _scratches["cpu"] = Scratch()
    return scratch


def _rows_per_slice(packed_format: type[Format], rows: int, columns: int, itemsize: int, limit: int) -> int:
    """Rows that fit into `limit` bytes; a slice must begin and end between blocks."""
    aligned = packed_format.block_length // math.gcd(packed_format.block_length, columns)
    return min(rows, max(1, limit // (columns * itemsize * aligned)) * aligned)


def _linear(input: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, format: str, rows: int,
            value_dtype: torch.dtype | None, down: torch.Tensor | None, ups: list[torch.Tensor],
            slices: list[int]) -> torch.Tensor:
    packed_format = FORMATS[format]
    columns = input.shape[-1]
    on_cpu = input.device.type == "cpu"
    as_it_lies = packed_format.plain_dtype == input.dtype
    scratch = shared_scratch()
    flat = input.reshape(-1, columns)
    limit = SCRATCH_BYTES if on_cpu else DEVICE_SCRATCH_BYTES
    if on_cpu and flat.shape[0] < FEW_TOKENS:
        limit = min(limit, CACHED_BYTES)
    step = rows if as_it_lies else _rows_per_slice(packed_format, rows, columns, input.dtype.itemsize, limit)
    # The low-rank branch goes into the sum of the large product, which is rounded once: added to something already rounded a
    # weak LoRA would be lost, in the bias too. So the bias comes last.
    added = None if down is None else branch(flat, rows, down, ups, slices)
    fused = columns % packed_format.block_length == 0 and kernels.find(
        "linear", flat.device, packed_format, flat.dtype, value_dtype, flat.shape[0])

    def weight_slice(start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, columns)
        if as_it_lies:
            return packed[0].view(input.dtype).view(shape)
        weight = scratch.take(shape, input.dtype) if on_cpu else input.new_empty(shape)
        return kernels.unpack_into(packed_format, packed, weight, value_dtype, start * columns // packed_format.block_length)

    if fused:
        addend = bias.expand(flat.shape[0], rows) if added is None and bias is not None else added
        out = input.new_empty((flat.shape[0], rows))
        fused(packed_format, packed, flat.contiguous(), addend, out, value_dtype)
    else:
        with scratch.lock if on_cpu else contextlib.nullcontext():
            if added is not None:
                out = added
                for start in range(0, rows, step):
                    stop = min(rows, start + step)
                    out[:, start:stop].addmm_(flat, weight_slice(start, stop).t())
            elif step == rows:
                out = torch.nn.functional.linear(flat, weight_slice(0, rows), bias)
            else:
                out = input.new_empty((flat.shape[0], rows))
                for start in range(0, rows, step):
                    stop = min(rows, start + step)
                    weight = weight_slice(start, stop)
                    if bias is None:
                        torch.mm(flat, weight.t(), out=out[:, start:stop])
                    else:
                        torch.addmm(bias[start:stop], flat, weight.t(), out=out[:, start:stop])
    if added is not None and bias is not None:
        out += bias
    return out.view(*input.shape[:-1], rows)


def _linear_fake(input, packed, bias, format, rows, value_dtype, down, ups, slices):
    return input.new_empty((*input.shape[:-1], rows))


def each_slice(ups, slices) -> list[tuple[int, int, torch.Tensor, int, int]]:
    """(first row, end row, up, first rank, end rank) of each slice of a low-rank branch; `slices` has four numbers a slice."""
    return [(*slices[4 * index:4 * index + 2], up, *slices[4 * index + 2:4 * index + 4]) for index, up in enumerate(ups)]


def branch(input: torch.Tensor, rows: int, down: torch.Tensor, ups: list[torch.Tensor], slices: list[int]) -> torch.Tensor:
    """`(input A^T) B^T`, to which the product with the weight is added. Returns (M, rows).

    input: (M, K). down: A (R, K). ups, slices: see `each_slice`.
    """
    hidden = input @ down.t()
    if slices[:2] == [0, rows] and len(ups) == 1:
        return hidden @ ups[0].t()
    out = input.new_zeros((input.shape[0], rows))
    for row, row_end, up, rank, rank_end in each_slice(ups, slices):
        out[:, row:row_end].addmm_(hidden[:, rank:rank_end], up.t())
    return out


def plus_branch(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor | None = None, ups=(),
                slices=()) -> torch.Tensor:
    """`linear` with a dense weight (N, K) in the dtype of `input`."""
    if down is None:
        return torch.nn.functional.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    out = branch(flat, weight.shape[0], down, ups, slices).addmm(flat, weight.t())
    return (out if bias is None else out + bias).view(*input.shape[:-1], -1)


def _embedding(ids: torch.Tensor, packed: list[torch.Tensor], format: str, columns: int, dtype: torch.dtype) -> torch.Tensor:
    packed_format = FORMATS[format]
    out = torch.empty((*ids.shape, columns), dtype=dtype, device=packed[0].device)
    return kernels.unpack_into(packed_format, packed_format.rows(packed, columns, ids.flatten()), out)


def _embedding_fake(ids, packed, format, columns, dtype):
    return torch.empty((*ids.shape, columns), dtype=dtype, device=packed[0].device)


def _unpack(packed: list[torch.Tensor], format: str, shape: list[int], dtype: torch.dtype,
            value_dtype: torch.dtype | None, first: int = 0) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed[0].device)
    return kernels.unpack_into(FORMATS[format], packed, out, value_dtype, first)


def _unpack_fake(packed, format, shape, dtype, value_dtype, first=0):
    return torch.empty(shape, dtype=dtype, device=packed[0].device)


_library = torch.library.Library("featherweight", "DEF")
for _schema, _function, _fake in (
    ("linear(Tensor input, Tensor[] packed, Tensor? bias, str format, int rows, ScalarType? value_dtype, Tensor? down, "
     "Tensor[] ups, int[] slices) -> Tensor",
     _linear, _linear_fake),
    ("embedding(Tensor ids, Tensor[] packed, str format, int columns, ScalarType dtype) -> Tensor",
     _embedding, _embedding_fake),
    ("unpack(Tensor[] packed, str format, int[] shape, ScalarType dtype, ScalarType? value_dtype, int first=0) -> Tensor",
     _unpack, _unpack_fake),
):
    _name = _schema.split("(")[0]
    _library.define(_schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"featherweight::{_name}", _fake, lib=_library)


def linear(input: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None,
           value_dtype: torch.dtype | None = None, down: torch.Tensor | None = None, ups=(), slices=()) -> torch.Tensor:
    """`input @ weight.T + bias` in the dtype of `input`, the weight unpacked slice by slice, plus a low-rank branch.

    input: (..., K) float. weight: packed, logical shape (N, K), same device. bias: (N,) in input's dtype or None.
    value_dtype: round the unpacked values to this dtype first (None: straight to input's). down: (R, K), ups: each (n, r),
    slices: four numbers for each up, its rows in the output and its ranks in down; all in input's dtype. Returns (..., N).
    """
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"A layer of {weight.shape[1]} input features was given {input.shape[-1]}: the model and what is fed"
                           " to it (often the text encoder's output) do not belong together.")
    if input.requires_grad and torch.is_grad_enabled():
        return plus_branch(input, unpack(weight, input.dtype, value_dtype), bias, down, ups, slices)
    return torch.ops.featherweight.linear(
        input, packed_tensors(weight), bias, weight.layout_cls.format.__name__, weight.shape[0], value_dtype, down, ups, slices)


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _linear_of_the_host(_, args, kwargs):
    """`torch.nn.functional.linear` in inference mode, as where the host multiplies with an embedding table to write text."""
    input, weight, bias = (*args, None)[:3]
    if isinstance(input, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        return torch.nn.functional.linear(*dequantize_args((input, weight, bias)))
    return linear(input, weight, bias)


def embedding(ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a packed table: only the rows asked for are unpacked.

    ids: integer, any shape, on the table's device. weight: packed, logical shape (rows, K). Returns (*ids.shape, K) in `dtype`.
    """
    packed_format = weight.layout_cls.format
    if weight.shape[1] % packed_format.block_length:  # blocks cross rows
        return torch.nn.functional.embedding(ids, unpack(weight, dtype))
    return torch.ops.featherweight.embedding(ids, packed_tensors(weight), packed_format.__name__, weight.shape[1], dtype)


def unpack(weight: QuantizedTensor, dtype: torch.dtype, value_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole dense weight in `dtype`, rounded once from float32 (or first to `value_dtype`)."""
    return torch.ops.featherweight.unpack(
        packed_tensors(weight), weight.layout_cls.format.__name__, list(weight.shape), dtype, value_dtype)


def plain_values(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The values of a weight whose bytes are numbers of `dtype`, as they lie, not to be written to; None of all others."""
    if not is_packed(weight) or weight.layout_cls.format.plain_dtype != dtype:
        return None
    return packed_tensors(weight)[0].view(dtype).view(weight.shape)


def scratch_serves(weight: QuantizedTensor, input: torch.Tensor) -> bool:
    """Whether a weight is best taken from the scratch: on a CPU, where it must be unpacked and no gradient needs it later."""
    return (input.device.type == "cpu" and plain_values(weight, input.dtype) is None and not torch.compiler.is_compiling()
            and not (input.requires_grad and torch.is_grad_enabled()))


@contextlib.contextmanager
def unpacked_in_scratch(weight: QuantizedTensor, dtype: torch.dtype, value_dtype: torch.dtype | None = None):
    """Inside this block: the whole dense weight in `dtype`, without fresh pages for it; see `unpack` and `scratch_serves`."""
    scratch = shared_scratch()
    with scratch.lock:
        dense = scratch.take(weight.shape, dtype)
        yield kernels.unpack_into(weight.layout_cls.format, packed_tensors(weight), dense, value_dtype)


def unpack_rows(weight: QuantizedTensor, dtype: torch.dtype, change, value_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole dense weight in `dtype`, each slice of its rows handed to `change` in float32 before it is rounded, dithered.

    change(rows, start): float32 rows of the weight from row `start` on -> the rows to keep.
    """
    packed_format, shape = weight.layout_cls.format, weight.shape
    columns = shape[1:].numel()
    step = _rows_per_slice(packed_format, shape[0], columns, torch.float32.itemsize, SCRATCH_BYTES)
    tensors = packed_tensors(weight)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    for start in range(0, shape[0], step):
        rows = torch.ops.featherweight.unpack(
            tensors, packed_format.__name__, [min(step, shape[0] - start), *shape[1:]], torch.float32, value_dtype,
            start * columns // packed_format.block_length)
        out[start:start + len(rows)] = rounding.dithered(change(rows, start), dtype)
    return out
