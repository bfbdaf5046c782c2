"""Chooses what the files of a model are packed to, so that it fits the device it runs on.

What is chosen is what the other options of the loaders' `pack_to` are too: the files as they are, a
type, or a size.
"""
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...ops.tensor.packed_layout import is_packed
from ..byte_sizes import GB, size_text
from ..files.container import WeightFileError
from ..inspect.contents import Contents, diffusion_comfy_keys, encoder_comfy_keys, file_contents
from ..name_lists import join_some
from ..packing.planning.fit import (
    FAST_FORMAT,
    STREAMED_TYPE,
    Choice,
    Memory,
    Weights,
    choose,
    shares,
    step_memory,
    workspace_bytes,
)
from ..packing.planning.plan import DIGITS
from .pack_on_load import size_of_target, size_target

FIT = "fit this GPU"  # in place of a type to pack to
FIT_KEY = "featherweight_fit"  # attachment of a patcher: `Targets.text`
HALF_BYTES = 2  # of a value that ComfyUI computes in 16 bits


@dataclass(frozen=True)
class Targets:
    """What the files of a model are packed to.

    Attributes:
        files: for each file a type, a `size_target`, or None for the file as it is.
        text: what was chosen for a device, and how it is the same on every device; "" where
            nothing was chosen.
    """

    files: tuple[str | None, ...]
    text: str = ""

    def attach(self, patcher):
        """Attaches the text to the host's ModelPatcher, whose clones keep it."""
        if self.text:
            patcher.set_attachments(FIT_KEY, self.text)


def fit_text(patcher) -> str:
    """Returns what was chosen for a model, "" where nothing was."""
    return patcher.get_attachment(FIT_KEY) or ""


def model_targets(pack_to: str | None, paths: Sequence[str], device: torch.device,
                  formats: Container[str]) -> Targets:
    """Returns what a diffusion model is packed to.

    Args:
        pack_to: None, FIT, a type, or a `size_target` for all files together.
        paths: of its file or folder, and of a module if it has one.
        device: where it runs.
        formats: names of ComfyUI's own formats that this pack computes there.

    Raises:
        WeightFileError: if a file cannot be read, or if the model does not fit into memory that it
            shares with the system.
    """
    if _is_fixed(pack_to, paths):
        return Targets((pack_to,) * len(paths))
    files, config = [], None
    for contents in map(file_contents, paths):
        tensors, prefix, detected = diffusion_comfy_keys(contents)
        config = config or detected
        files.append(_weights(contents, tensors, prefix))
    step = step_memory(config) if config else None
    step_bytes, memory = step[0] if step else None, Memory.of(device)
    return _targets(pack_to, paths, files, memory,
                    partial(memory.for_model, step_bytes), FAST_FORMAT not in formats)


def encoder_targets(pack_to: str | None, paths: Sequence[str], device: torch.device) -> Targets:
    """Returns what the text encoders of one CLIP are packed to.

    Args:
        pack_to: as for `model_targets`.
        paths: of their files or folders.
        device: where they run.

    Raises:
        WeightFileError: as for `model_targets`.
    """
    if _is_fixed(pack_to, paths):
        return Targets((pack_to,) * len(paths))
    files = [_weights(contents, encoder_comfy_keys(contents)[0])
             for contents in map(file_contents, paths)]
    memory = Memory.of(device)
    return _targets(pack_to, paths, files, memory, memory.for_encoder)


def _is_fixed(pack_to: str | None, paths: Sequence[str]) -> bool:
    """Returns whether each file is packed to the same, whatever is in it."""
    return pack_to is None or (pack_to != FIT and (
        size_of_target(pack_to) is None or len(paths) == 1))


def _targets(pack_to: str | None, paths: Sequence[str], files: Sequence[Weights], memory: Memory,
             room: Callable[[int], int], multiplies_int8: bool = False) -> Targets:
    """room: bytes for dequantised weights -> bytes for the weights."""
    if pack_to and (size := size_of_target(pack_to)) is not None:
        return Targets(tuple(map(size_target, shares(size, files))))
    workspace = max(workspace_bytes(file.shapes) for file in files)
    choice = choose(files, room(workspace), room(0), multiplies_int8)
    if choice.missing and memory.is_shared:
        names = join_some([os.path.basename(os.path.normpath(path)) for path in paths])
        raise WeightFileError(
            f"{names}: the weights take {_lack(choice)} there is for them on {memory.text}, even"
            " with the smallest types. Use a smaller model, or choose a type at pack to, if you"
            " know that the memory is enough.")
    is_packed_in_file = any(file.packed for file in files)
    if isinstance(choice.target, int):
        targets = tuple(map(size_target, shares(choice.target, files)))
    else:
        stays = not choice.target or (choice.missing and is_packed_in_file)
        targets = (None if stays else choice.target,) * len(files)
    return Targets(targets, _text(choice, memory, is_packed_in_file))


def _text(choice: Choice, memory: Memory, is_packed_in_file: bool = False) -> str:
    room = size_text(choice.room)
    if choice.missing:
        what = "they stay as in the file" if is_packed_in_file else f"they are {STREAMED_TYPE}"
        return (f"The weights take {_lack(choice)} there is for them on {memory.text}, even with"
                f" the smallest types. So {what}, and what does not fit is copied in each step:"
                " Place Model (Featherweight) sets how much. A smaller model fits.")
    if not choice.target:
        return f"The file fits unchanged: its weights may take {room} of {memory.text}."
    fixed = choice.target
    if isinstance(choice.target, int):
        fixed = f"mix for a size, {choice.target / GB:.{DIGITS}f} GB,"
    return (f"Packed for {memory.text}, which leaves {room} for the weights. {fixed} at pack to"
            " gives the same on every device.")


def _lack(choice: Choice) -> str:
    needed = choice.room + choice.missing
    return f"{size_text(needed, DIGITS)}, {size_text(choice.missing, DIGITS)} more than"


def _weights(contents: Contents, tensors: dict[str, torch.Tensor], prefix: str = "") -> Weights:
    """Returns the weights of a file; tensors: by the host's names, with this prefix."""
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in tensors.items()
              if name.startswith(prefix)}
    stored = {name.removeprefix(prefix): tensor for name, tensor in contents.tensors.items()
              if name.startswith(prefix)}
    packed = {name: tensor.nbytes for name, tensor in stored.items() if is_packed(tensor)}
    return Weights(shapes, _bytes_in_memory(stored.values()), packed)


def _bytes_in_memory(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of weights as they are in a file; of float32 the host keeps 16 bits."""
    return sum(tensor.nbytes if is_packed(tensor)
               else min(tensor.nbytes, HALF_BYTES * tensor.numel()) for tensor in tensors)
