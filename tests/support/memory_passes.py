"""What torch does on a device for an operation: launches of kernels, and bytes that they move.
Counted, not timed.

The operation runs on torch's `meta` device, where tensors have no memory and code takes the way it
takes on a GPU. Every operator that torch dispatches there is one launch of a kernel, but for views
and fresh memory, which are none.
"""
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.ops.formats.base import DEVICE_CHUNK_VALUES, Format, QParam
from featherweight.ops.layers import product
from featherweight.ops.low_rank import LowRank, Slice

META = torch.device("meta")


class Passes(TorchDispatchMode):
    """Counts what runs inside.

    launches: of kernels. moved: bytes that they read and write: each input once, without what is
    broadcast, and each output.
    names: of the operators, in order.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.moved = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (
            not func.is_view
            and "empty" not in func._schema.name
            and "_unsafe_view" not in func._schema.name
        ):
            self.launches += 1
            self.moved += nbytes(_read(func, args, kwargs)) + nbytes(out)
            self.names.append(func._schema.name.removeprefix("aten::"))
        return out


# They write the tensor they are called on, and do not read it.
_ONLY_WRITE = {"aten::copy_", "aten::fill_", "aten::zero_"}


def _read(func, args, kwargs) -> list:
    """The arguments that an operator reads: not those it only writes, such as `out`."""
    names = [argument.name for argument in func._schema.arguments if argument.is_out]
    if func._schema.name in _ONLY_WRITE:
        args = args[1:]
    return [args, [value for name, value in kwargs.items() if name not in names]]


def nbytes(tensors) -> int:
    """Bytes of the elements of all tensors in a structure; one that is repeated along a dimension
    counts once."""
    return sum(
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride) *
        tensor.itemsize for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))


def held(packed_format: Format, values: int) -> list[torch.Tensor]:
    """What a weight of so many values holds, without memory."""
    blocks = values // packed_format.block_length
    return [torch.empty(qparam.length(blocks), dtype=qparam.dtype, device=META)
            for qparam in (QParam(torch.uint8, packed_format.block_bytes), *packed_format.qparams)]


def of_dequantizing(packed_format: Format, dtype: torch.dtype = torch.bfloat16) -> Passes:
    """The passes of one whole chunk, dequantised to `dtype`. Lookup tables are there already."""
    values = DEVICE_CHUNK_VALUES // packed_format.block_length * packed_format.block_length
    tensors, out = held(packed_format, values), torch.empty(values, dtype=dtype, device=META)
    packed_format.dequantize_into(tensors, out)
    with Passes() as passes:
        packed_format.dequantize_into(tensors, out)
    return passes


def of_linear(packed_format: Format, rows: int, columns: int, low_rank: LowRank | None = None,
              tokens: int = 4608, bias: bool = True) -> Passes:
    """The passes of one call of a linear layer in bfloat16. low_rank: on `META`."""
    input = torch.empty((tokens, columns), dtype=torch.bfloat16, device=META)
    added = torch.empty(rows, dtype=torch.bfloat16, device=META) if bias else None
    branch = (None, (), ()) if low_rank is None else low_rank.operands
    operands = (
        input,
        held(packed_format, rows * columns),
        added,
        packed_format.name,
        rows,
        *branch,
    )
    of_dequantizing(packed_format)  # for the lookup tables
    with Passes() as passes:
        # what the operator runs; the operator itself only gives shapes on `META`
        product._linear(*operands)
    return passes


def low_rank(rows: int, columns: int, ranks: int, parts: int) -> LowRank:
    """A branch without memory: LoRAs of `ranks` on each of `parts` equal parts of the rows."""
    height = rows // parts
    down = torch.empty((parts * ranks, columns), dtype=torch.bfloat16, device=META)
    ups = tuple(
        torch.empty((height, ranks), dtype=torch.bfloat16, device=META) for _ in range(parts))
    return LowRank(
        down, ups,
        tuple(
            Slice(part * height, (part + 1) * height, part * ranks, (part + 1) * ranks)
            for part in range(parts)))
