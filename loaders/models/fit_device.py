"""Chooses what the files of a model are packed to, so that it fits the device it runs on.

What is chosen is what the other options of the loaders' `pack_to` are too: the file as it is, a
type, or a size.
"""
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ...ops.tensor.packed_layout import is_packed
from ..byte_sizes import size_text
from ..files.container import WeightFileError
from ..inspect.contents import Contents, diffusion_comfy_keys, encoder_comfy_keys, file_contents
from ..packing.planning.fit import (
    STREAMED_TYPE,
    Choice,
    Memory,
    choose,
    step_memory,
    workspace_bytes,
)
from .pack_on_load import GB, size_target

FIT = "fit this GPU"  # in place of a type to pack to
FIT_KEY = "featherweight_fit"  # attachment of a patcher: its `Fit`
INT8 = "int8_tensorwise"  # ComfyUI's name of FAST_TYPE
HALF_BYTES = 2  # of a value that ComfyUI computes in 16 bits
DIGITS = 2  # decimal places of sizes


@dataclass(frozen=True)
class Fit:
    """What was chosen for the files of a model.

    Attributes:
        targets: for each file what the loaders take as `pack_to`: a type, a size, or None.
        text: what was chosen, and how it is the same on every device.
    """

    targets: tuple[str | None, ...]
    text: str

    def attach(self, patcher):
        """Attaches it to the host's ModelPatcher, whose clones keep it."""
        patcher.set_attachments(FIT_KEY, self)


@dataclass
class _Part:
    """The weights of one file of a model.

    shapes: by the host's names. nbytes: in memory, as they are in the file. packed: the bytes of
    those that are packed in the file.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    packed: dict[str, int]
    choice: Choice = field(init=False)

    @classmethod
    def of(cls, file: Contents, tensors: dict[str, torch.Tensor], prefix: str = "") -> "_Part":
        shapes = {name.removeprefix(prefix): tuple(tensor.shape)
                  for name, tensor in tensors.items() if name.startswith(prefix)}
        stored = {name.removeprefix(prefix): tensor for name, tensor in file.tensors.items()
                  if name.startswith(prefix)}
        packed = {name: tensor.nbytes for name, tensor in stored.items() if is_packed(tensor)}
        return cls(file.name, shapes, _bytes_in_memory(stored.values()), packed)


def fit_text(patcher) -> str:
    """Returns what was chosen for a model, "" where nothing was."""
    fit = patcher.get_attachment(FIT_KEY)
    return fit.text if fit else ""


def fit_model(paths: Sequence[str], device: torch.device, formats: Container[str]) -> Fit:
    """Chooses for a diffusion model.

    Args:
        paths: of its file or folder, and of a module if it has one.
        device: where it runs.
        formats: names of ComfyUI's own formats that this pack computes there.

    Raises:
        WeightFileError: if a file cannot be read, or if the model does not fit into memory that it
            shares with the system.
    """
    parts, config = [], None
    for file in map(file_contents, paths):
        tensors, prefix, detected = diffusion_comfy_keys(file)
        config = config or detected
        parts.append(_Part.of(file, tensors, prefix))
    step = step_memory(config) if config is not None else None
    memory, step_bytes = Memory.of(device), step[0] if step else None
    workspace = max(workspace_bytes(part.shapes) for part in parts)
    rooms = [memory.for_model(step_bytes, each) for each in (workspace, 0)]
    return _fit(parts, memory, *rooms, INT8 not in formats)


def fit_encoders(paths: Sequence[str], device: torch.device) -> Fit:
    """Chooses for the text encoders that are loaded as one CLIP.

    Args:
        paths: of their files or folders.
        device: where they run.

    Raises:
        WeightFileError: as for `fit_model`.
    """
    parts = [_Part.of(file, encoder_comfy_keys(file)[0]) for file in map(file_contents, paths)]
    memory = Memory.of(device)
    workspace = max(workspace_bytes(part.shapes) for part in parts)
    return _fit(parts, memory, *(memory.for_encoder(each) for each in (workspace, 0)))


def _fit(parts: list[_Part], memory: Memory, room: int, room_unpacked: int,
         multiplies_int8: bool = False) -> Fit:
    """Chooses for each file, which has room by its share of the bytes."""
    total = sum(part.nbytes for part in parts) or 1
    for part in parts:
        share = part.nbytes / total
        part.choice = choose(part.shapes, part.nbytes, int(room * share),
                             int(room_unpacked * share), part.packed, multiplies_int8)
        if part.choice.missing and memory.is_shared:
            raise WeightFileError(
                f"{part.name} {_lack(part.choice)} on {memory.text}, even with the smallest"
                " types. Use a smaller model, or choose a type at pack to, if you know that the"
                " memory is enough.")
    return Fit(tuple(_target(part.choice) for part in parts),
               "\n".join(_text(part, memory) for part in parts))


def _target(choice: Choice) -> str | None:
    return size_target(choice.target) if isinstance(choice.target, int) else choice.target or None


def _text(part: _Part, memory: Memory) -> str:
    choice, room = part.choice, size_text(part.choice.room)
    if choice.missing:
        return (f"{part.name} {_lack(choice)} on {memory.text}, even with the smallest types. So"
                f" {'it stays as in the file' if part.packed else f'it is {STREAMED_TYPE}'}, and"
                " what does not fit is copied in each step: Place Model (Featherweight) sets how"
                " much. A smaller model fits.")
    if not choice.target:
        return f"{part.name} fits {memory.text} as it is: {room} are for weights."
    fixed = choice.target
    if isinstance(choice.target, int):
        fixed = f"size in GB, {choice.target / GB:.{DIGITS}f},"
    return (f"Packed for {memory.text}, which leaves {room} for the weights. {fixed} at pack to"
            " gives the same on every device.")


def _lack(choice: Choice) -> str:
    needed = choice.room + choice.missing
    return (f"takes {size_text(needed, DIGITS)}, {size_text(choice.missing, DIGITS)} more than its"
            " weights may have")


def _bytes_in_memory(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of weights as they are in a file; of float32 the host keeps 16 bits."""
    return sum(tensor.nbytes if is_packed(tensor)
               else min(tensor.nbytes, HALF_BYTES * tensor.numel()) for tensor in tensors)
