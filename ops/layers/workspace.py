"""The workspace that weights are dequantised into, and how much of a weight it takes at a time."""
import math
import threading
import weakref
from collections.abc import Callable

import torch

from ..formats.base import Format

# A weight is dequantised into at most this many bytes at a time. Larger weights go through the
# product in slices of rows.
CPU_WORKSPACE_BYTES = 64 << 20
DEVICE_WORKSPACE_BYTES = 256 << 20


class Workspace:
    """A reused CPU buffer for dequantised weights.

    Fresh pages for every weight would cost more than dequantising it. On other devices torch's
    caching allocator does the same, and gives the memory back when the host asks for it.
    """

    def __init__(self):
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.lock = threading.Lock()  # held while a weight in the buffer is in use

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self._buffer.nbytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised CPU tensor, valid until the next call."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes].view(dtype).view(shape)

    def __deepcopy__(self, memo):
        return self  # a copied layer shares it like any other


_workspaces = weakref.WeakValueDictionary()


def shared_workspace() -> Workspace:
    """Returns the workspace of all layers. It is freed with the last packed layer that holds it."""
    shared = _workspaces.get("cpu")
    if shared is None:
        shared = _workspaces["cpu"] = Workspace()
    return shared


class workspace:  # noqa: N801  a context manager
    """Gives take(shape, dtype) inside the block: returns an uninitialised tensor, valid until the
    next call.

    While a weight in the shared one is in use, as by another thread, or around the layer whose
    product a hook runs meanwhile, it takes memory of its own and does not wait.
    """

    def __init__(self, device: torch.device):
        shared = shared_workspace() if device.type == "cpu" else None
        self._shared = shared if shared and shared.lock.acquire(blocking=False) else None
        self._device = device

    def __enter__(self) -> Callable[[tuple[int, ...], torch.dtype], torch.Tensor]:
        if self._shared is not None:
            return self._shared.take
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=self._device)

    def __exit__(self, *error):
        if self._shared is not None:
            self._shared.lock.release()


def workspace_bytes(device: torch.device) -> int:
    """Returns the most bytes that a dequantised part of a weight may take."""
    return CPU_WORKSPACE_BYTES if device.type == "cpu" else DEVICE_WORKSPACE_BYTES


def rows_within(nbytes: int, packed_format: Format, columns: int, row_bytes: int,
                multiple: int = 1) -> int:
    """Returns how many rows fit in `nbytes`, at least one block-aligned group.

    Args:
        nbytes: bytes available.
        packed_format: the weight's format; slices of the rows begin and end between its blocks.
        columns: values in a row.
        row_bytes: bytes a row takes there.
        multiple: the result is a multiple of this many rows.
    """
    group = math.lcm(packed_format.block_length // math.gcd(packed_format.block_length, columns),
                     multiple)
    return max(1, nbytes // (row_bytes * group)) * group
