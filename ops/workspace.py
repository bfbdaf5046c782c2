"""Where weights are dequantised to be used at once: a buffer on the CPU, and how much of a weight
goes into it at a time."""
import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from .format import Format

# A weight is dequantised into at most this many bytes at a time. Larger weights go through the
# product in slices of rows.
CPU_WORKSPACE_BYTES = 64 << 20
DEVICE_WORKSPACE_BYTES = 256 << 20


class Workspace:
    """One reused CPU buffer for dequantised weights. Fresh pages for every weight would cost more
    than dequantising it.

    Elsewhere torch's caching allocator does the same, and gives the memory back when the host asks
    for it.
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


_workspaces = weakref.WeakValueDictionary()


def shared_workspace() -> Workspace:
    """The scratch of all layers. It lives as long as somebody holds it: each packed layer does."""
    scratch = _workspaces.get("cpu")
    if scratch is None:
        scratch = _workspaces["cpu"] = Workspace()
    return scratch


@contextlib.contextmanager
def workspace(
        device: torch.device) -> Iterator[Callable[[tuple[int, ...], torch.dtype], torch.Tensor]]:
    """Inside this block: take(shape, dtype) -> an uninitialised tensor on `device`, valid until the
    next call."""
    if device.type != "cpu":
        yield lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
        return
    scratch = shared_workspace()
    with scratch.lock:
        yield scratch.take


def workspace_bytes(device: torch.device) -> int:
    """Bytes that a dequantised part of a weight may have."""
    return CPU_WORKSPACE_BYTES if device.type == "cpu" else DEVICE_WORKSPACE_BYTES


def rows_within(nbytes: int, packed_format: type[Format], columns: int, row_bytes: int,
                multiple: int = 1) -> int:
    """How many rows fit into `nbytes`, and as few as may be where none do, in slices that begin and
    end between blocks.

    row_bytes: what a row takes there. multiple: slices are a multiple of this many rows.
    """
    whole = math.lcm(packed_format.block_length // math.gcd(packed_format.block_length, columns),
                     multiple)
    return max(1, nbytes // (row_bytes * whole)) * whole
