"""Slices and joins rows of weights, packed or not, without dequantising them.

Where the blocks of a packed format cross rows, and where a part to join is dense, the result is
dense.
"""
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from comfy_kitchen.tensor import register_layout_op
from comfy_kitchen.tensor.base import dequantize_args
from torch import Tensor

from ..formats.base import Format
from ..formats.low_rank_and_joined import Joined
from .packed_layout import (
    PackedLayout,
    QuantizedTensor,
    is_packed,
    join_packed,
    pack_16bit,
    packed_tensor,
    packed_tensors,
)
from .packed_tensor import PackedTensor, relabel


def dense(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor that may be packed, in its logical dtype, by the reference.

    What comes packed from a file has the logical dtype float32.
    """
    return tensor.dequantize() if is_packed(tensor) else tensor


def take_rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """Returns `tensor[index]` along the first dimension; a packed slice shares the bytes.

    Args:
        tensor: (R, ...), packed or not.
        index: a slice without a step, or int64 (n,).

    Returns:
        (n, ...) in the format and dtype of `tensor`.
    """
    count = len(range(*index.indices(len(tensor)))) if isinstance(index, slice) else len(index)
    if isinstance(index, slice) and count == len(tensor):
        return tensor
    if not rows_are_whole_blocks(tensor):
        joined = _rows_of_joined(tensor, index) if isinstance(index, slice) else None
        return dense(tensor)[index] if joined is None else joined
    packed_format = tensor.params.format
    data, *qparams = packed_format.rows(packed_tensors(tensor), tensor.shape[1:].numel(), index)
    return packed_tensor(packed_format, data, (count, *tensor.shape[1:]), tensor.dtype, *qparams)


def _joined_parts(tensor: PackedTensor, joined: Joined) -> list[PackedTensor]:
    """Returns the weights that a weight in the format `joined` was joined from."""
    found, (data,) = [], packed_tensors(tensor)
    for part in joined.parts:
        part_data, *qparams = part.tensors(data.view(-1))  # which share its bytes
        found.append(packed_tensor(part.format, part_data, (part.rows, part.columns), tensor.dtype,
                                   *qparams))
    return found


def _joined_format(tensor: Tensor) -> Joined | None:
    packed_format = tensor.params.format if is_packed(tensor) else Format
    return packed_format if isinstance(packed_format, Joined) else None


def _rows_of_joined(tensor: Tensor, index: slice) -> Tensor | None:
    """Returns rows of a weight that was joined from several, packed; None for any other."""
    joined = _joined_format(tensor)
    if joined is None or not is_packed(tensor):
        return None
    start, stop, _ = index.indices(len(tensor))
    taken = []
    for place, part in zip(joined.parts, _joined_parts(tensor, joined)):
        first, last = max(start - place.row, 0), min(stop - place.row, place.rows)
        if first < last:
            taken.append(take_rows(part, slice(first, last)))
    if not taken or not all(map(is_packed, taken)):
        return None
    return join_packed(taken, joined.axis) if len(taken) > 1 else taken[0]


def without_padding(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Returns a weight without the rows and columns that its format's files are filled up with.

    Padded columns make it dense: they are rare, and in small layers.

    Args:
        tensor: (N, K), packed or not.
        shape: of the layer's weight. A tensor whose format does not pad to its own shape is
            returned as it is.
    """
    if not is_packed(tensor) or tensor.shape == shape or len(shape) != 2:
        return tensor
    padding = tensor.params.format.padding
    if any(size != -(-needed // padding) * padding for size, needed in zip(tensor.shape, shape)):
        return tensor
    rows = take_rows(tensor, slice(0, shape[0]))
    return rows if rows.shape == shape else dense(rows)[:, :shape[1]].contiguous()


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates the rows of all parts.

    Packed parts in several formats become one packed weight, with others of 16 bits too.

    Args:
        parts: each (R_i, ...), with the same other dimensions.

    Returns:
        (sum of R_i, ...) in the dtype of the first part.
    """
    parts = [piece for part in parts for piece in _joined_rows(part)]
    if len(parts) == 1:
        return parts[0]
    packed_format = _common_format(parts, 1)
    if packed_format is None:
        packed = [pack_16bit(part, part.dtype) for part in parts]
        whole = [part for part in packed if part.ndim == 2 and rows_are_whole_blocks(part)]
        if any(map(is_packed, parts)) and len(whole) == len(parts):
            runs = _joined_runs(whole)
            return join_packed(runs, 0) if len(runs) > 1 else runs[0]
        return torch.cat(_promotable([dense(part) for part in parts]))
    columns = parts[0].shape[1:].numel()
    data, *qparams = _joined(packed_format, _concatenate, [_rows(part, columns) for part in parts])
    return packed_tensor(packed_format, data, (sum(map(len, parts)), *parts[0].shape[1:]),
                         parts[0].dtype, *qparams)


def _promotable(parts: list[Tensor]) -> list[Tensor]:
    """Returns tensors that torch joins: it does not promote fp8 to other dtypes."""
    if len({part.dtype for part in parts}) == 1:
        return parts
    return [part.float() if part.itemsize == 1 and part.is_floating_point() else part
            for part in parts]


def _joined_rows(tensor: Tensor) -> Sequence[Tensor]:
    """Returns the weights whose rows were joined to a weight; another is one by itself."""
    joined = _joined_format(tensor)
    if joined is None or joined.axis != 0 or not is_packed(tensor):
        return [tensor]
    return _joined_parts(tensor, joined)


def _joined_runs(parts: Sequence[PackedTensor]) -> list[PackedTensor]:
    """Joins neighbouring parts that become one weight of the format that they have."""
    runs = [[parts[0]]]
    for part in parts[1:]:
        if _common_format([runs[-1][0], part], 1) is None:
            runs.append([part])
        else:
            runs[-1].append(part)
    return [joined for joined in map(join_rows, runs) if is_packed(joined)]


def _concatenate(pieces: tuple[Tensor, ...]) -> Tensor:
    """Concatenates tensors; those that follow each other in memory are not copied."""
    first = pieces[0]
    end = first.storage_offset()
    for piece in pieces:
        if (not piece.is_contiguous() or piece.storage_offset() != end
                or piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()):
            return torch.cat(pieces)
        end += piece.numel()
    shape = (sum(map(len, pieces)), *first.shape[1:])
    return first.as_strided(shape, first.stride())


def interleave_rows(parts: Sequence[Tensor]) -> Tensor:
    """Interleaves the rows of all parts: the first row of every part, then the second, and so on.

    Args:
        parts: P tensors of one shape (..., R, K).

    Returns:
        (..., P * R, K) in the dtype of the first part.
    """
    *outer, rows, columns = parts[0].shape
    shape = (*outer, len(parts) * rows, columns)
    packed_format = _common_format(parts, -1)
    if packed_format is None:
        return torch.stack([dense(part) for part in parts], -2).reshape(shape)
    count = parts[0].shape[:-1].numel()

    def interleave(pieces: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([piece.view(count, -1) for piece in pieces], 1).flatten()

    data, *qparams = _joined(packed_format, interleave, [_rows(part, columns) for part in parts])
    return packed_tensor(packed_format, data, shape, parts[0].dtype, *qparams)


def _joined(packed_format: Format, join: Callable[[tuple[Tensor, ...]], Tensor],
            parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Joins the tensors of several weights, of which shared ones are alike in all."""
    shared = [False, *(qparam.is_shared for qparam in packed_format.qparams)]
    return [same[0] if is_shared else join(same) for is_shared, same in zip(shared, zip(*parts))]


def _rows(tensor: Tensor, columns: int) -> list[Tensor]:
    """Returns the tensors of a packed tensor as rows of `columns` values."""
    assert is_packed(tensor)
    return tensor.params.format.rows(packed_tensors(tensor), columns, slice(None))


def _common_format(parts: Sequence[Tensor], axis: int) -> Format | None:
    """Returns the packed format of all parts.

    None where they differ, also in what all blocks share, or their rows cannot be moved as bytes.
    """
    packed = [part for part in parts if rows_are_whole_blocks(part, axis)]
    formats = {part.params.format for part in packed}
    if len(packed) < len(parts) or len(formats) != 1:
        return None
    packed_format = formats.pop()
    qparams = zip(packed_format.qparams, *(packed_tensors(part)[1:] for part in packed))
    same = all(torch.equal(first, other) for qparam, first, *others in qparams if qparam.is_shared
               for other in others)
    return packed_format if same else None


def rows_are_whole_blocks(tensor: Tensor, axis: int = 1) -> TypeGuard[PackedTensor]:
    """Returns whether a tensor is packed and its dimensions from `axis` on are blocks that can be
    moved."""
    if not is_packed(tensor):
        return False
    packed_format = tensor.params.format
    return (packed_format.is_sliceable
            and tensor.shape[axis:].numel() % packed_format.block_length == 0)


# --- torch's own functions ---

_aten = torch.ops.aten


@register_layout_op(_aten.cat.default, PackedLayout)
def _cat(_, args, kwargs):
    """Runs `torch.cat`: joined rows stay packed, everything else is dense."""
    def cat(parts, dim=0):
        first, *others = parts
        ours = [part for part in parts if is_packed(part) or not isinstance(part, QuantizedTensor)]
        if dim in (0, -first.ndim) and first.ndim > 1 and len(ours) == len(parts) and all(
                (part.shape[1:], part.dtype, part.device)
                == (first.shape[1:], first.dtype, first.device) for part in others):
            return join_rows(parts)
        dense_parts: Any = dequantize_args(parts)
        return torch.cat(dense_parts, dim)

    return cat(*args, **kwargs)


def _split_rows(weight: PackedTensor, dim: int, sizes: Sequence[int]) -> list[Tensor] | None:
    """Returns the rows of a weight in parts that share its bytes; None where it must be dense."""
    is_movable = rows_are_whole_blocks(weight) or _joined_format(weight) is not None
    if dim not in (0, -weight.ndim) or weight.ndim < 2 or not is_movable:
        return None
    ends = list(itertools.accumulate(sizes))
    if not ends or ends[-1] != len(weight) or min(sizes) < 0:
        return None
    parts = [take_rows(weight, slice(end - size, end)) for size, end in zip(sizes, ends)]
    return [relabel(weight) if part is weight else part for part in parts]  # torch wants another


@register_layout_op(_aten.split_with_sizes.default, PackedLayout)
def _split_with_sizes(_, args, kwargs):
    """Runs `torch.split` with sizes: parts of rows stay packed, all others are dense."""
    def split(weight, split_sizes, dim=0):
        parts = _split_rows(weight, dim, split_sizes)
        return parts or _aten.split_with_sizes.default(dequantize_args(weight), split_sizes, dim)

    return split(*args, **kwargs)


@register_layout_op(_aten.split.Tensor, PackedLayout)
def _split(_, args, kwargs):
    """Runs `torch.split` with one size."""
    def split(weight, split_size, dim=0):
        count, size = len(weight), max(1, split_size)
        parts = _split_rows(weight, dim, [min(size, count - row) for row in range(0, count, size)])
        return parts or _aten.split.Tensor(dequantize_args(weight), split_size, dim)

    return split(*args, **kwargs)


@register_layout_op(_aten.chunk.default, PackedLayout)
def _chunk(_, args, kwargs):
    """Runs `torch.chunk`, which is a split of its own in inference mode only."""
    def chunk(weight, chunks, dim=0):
        return torch.split(weight, max(1, -(-weight.shape[dim] // max(1, chunks))), dim)

    return chunk(*args, **kwargs)
