"""Tensors in memory that may not be written, such as a mapped file: torch itself does not
remember."""
from collections.abc import Callable, Iterable, Iterator

import torch

from .packed_tensor import QuantizedTensor

MARK = "_featherweight_read_only"  # on the storage, which views of a tensor share

# Raises an error where others have changed the memory that it was made for.
MemoryGuard = Callable[[], None]


def mark_read_only(tensor: torch.Tensor, guard: MemoryGuard):
    """Mark the memory of a tensor, which its views and what is packed in it share."""
    setattr(tensor.untyped_storage(), MARK, guard)


def is_read_only(tensor: torch.Tensor) -> bool:
    """Whether this tensor, or the one it is a view of, was marked. Packed tensors: ask for their
    bytes."""
    return _guard(tensor) is not None


def guards_of(tensors: Iterable[torch.Tensor]) -> list[MemoryGuard]:
    """Return the guards of all memory that tensors lie in, quantised ones too, each guard once."""
    found = dict.fromkeys(_guard(part) for tensor in tensors for part in _parts(tensor))
    return [guard for guard in found if guard is not None]


def _guard(tensor: torch.Tensor) -> MemoryGuard | None:
    return getattr(tensor.untyped_storage(), MARK, None) if tensor.device.type == "cpu" else None


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the plain tensors that one is made of."""
    if isinstance(tensor, QuantizedTensor):
        yield tensor._qdata
        for field in tensor._params._tensor_fields():
            yield getattr(tensor._params, field)
    else:
        yield tensor
