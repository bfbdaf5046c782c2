"""Marks tensors in memory that may not be written, such as a mapped file.

torch itself does not record this.
"""
from collections.abc import Callable, Iterable

import torch

from .packed_tensor import QuantizedTensor, inner_tensors

MARK = "_featherweight_read_only"  # attribute of the storage, which all views of a tensor share

# Raises an error where another program has changed the memory it guards.
MemoryGuard = Callable[[], None]


def mark_read_only(tensor: torch.Tensor, guard: MemoryGuard):
    """Marks the memory of a tensor as read-only, for its views and what is packed in it too."""
    setattr(tensor.untyped_storage(), MARK, guard)


def is_read_only(tensor: torch.Tensor) -> bool:
    """Returns whether a plain tensor, or the one it is a view of, was marked.

    For a packed tensor, pass its bytes.
    """
    return _guard(tensor) is not None


def guards_of(tensors: Iterable[torch.Tensor]) -> list[MemoryGuard]:
    """Returns the guards of all memory that tensors use, quantised ones too, without repeats."""
    guards = dict.fromkeys(
        _guard(part) for tensor in tensors
        for part in (inner_tensors(tensor) if isinstance(tensor, QuantizedTensor) else [tensor]))
    return [guard for guard in guards if guard is not None]


def _guard(tensor: torch.Tensor) -> MemoryGuard | None:
    return getattr(tensor.untyped_storage(), MARK, None) if tensor.device.type == "cpu" else None
