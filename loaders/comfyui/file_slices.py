"""Has ComfyUI's dynamic VRAM read packed weights from their files, as it reads its own files.

A copy from a mapped file goes through page faults on Python's thread. ComfyUI's reader of
comfy-aimdo takes a file, an offset and a size, which `load_safetensors` leaves on a storage.
"""
import contextlib
import os
import threading
import weakref
from typing import Any

import comfy.memory_management
import torch

from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import FILE_PART, FileState, MappedFile

SLICE = "_comfy_tensor_file_slice"  # the attribute by which ComfyUI finds it


def stream_from_files(model: torch.nn.Module):
    """Marks the mapped bytes of a model's packed weights, where ComfyUI has dynamic VRAM."""
    make_slice = getattr(comfy.memory_management, "TensorFileSlice", None)
    if make_slice is None or not comfy.memory_management.aimdo_enabled:
        return
    readers: dict[MappedFile, tuple[Any, threading.Lock] | None] = {}
    for weight in model.parameters():
        storage = weight._qdata.untyped_storage() if is_packed(weight) else None
        part = getattr(storage, FILE_PART, None)
        if part is None or hasattr(storage, SLICE):
            continue
        if part.file not in readers:
            readers[part.file] = _reader(part.file)
        if reader := readers[part.file]:
            setattr(storage, SLICE, make_slice(*reader, part.offset, part.nbytes))


def _reader(mapped: MappedFile) -> tuple[Any, threading.Lock] | None:
    """Returns an open file and its lock; None where another file has the name by now."""
    with contextlib.suppress(OSError):
        file = open(mapped.path, "rb", buffering=0)  # noqa: SIM115  closed with the mapping
        weakref.finalize(mapped, file.close)
        if FileState.from_status(os.fstat(file.fileno())) == mapped.state:
            return file, threading.Lock()
    return None
