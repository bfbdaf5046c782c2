"""Chooses what the files of a model are packed to, so that it fits the device it runs on.

What is chosen is what the other options of the loaders' `pack_to` are too: the files as they are, a
type, or a size.
"""
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ops.tensor.packed_layout import is_packed
from ..byte_sizes import size_text
from ..files.container import WeightFileError
from ..inspect.contents import Contents, diffusion_comfy_keys, encoder_comfy_keys, file_contents
from ..name_lists import join_some
from ..packing.planning.fit import (
    STREAMED_TYPE,
    Choice,
    Memory,
    Weights,
    choose,
    shares,
    step_memory,
    workspace_bytes,
)
from .pack_on_load import GB, size_of_target, size_target

FIT = "fit this GPU"  # in place of a type to pack to
FIT_KEY = "featherweight_fit"  # attachment of a patcher: `Targets.text`
INT8 = "int8_tensorwise"  # ComfyUI's name of fit.FAST_TYPE
HALF_BYTES = 2  # of a value that ComfyUI computes in 16 bits
DIGITS = 2  # decimal places of sizes


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
    configs = []

    def weights_of(contents: Contents) -> Weights:
        tensors, prefix, config = diffusion_comfy_keys(contents)
        configs.append(config)
        return _weights(contents, tensors, prefix)

    def rooms(memory: Memory, workspace: int) -> tuple[int, int]:
        config: Any = next(filter(None, configs), None)
        step = step_memory(config) if config else None
        step_bytes = step[0] if step else None
        return memory.for_model(step_bytes, workspace), memory.for_model(step_bytes)

    return _targets(pack_to, paths, device, weights_of, rooms, INT8 not in formats)


def encoder_targets(pack_to: str | None, paths: Sequence[str], device: torch.device) -> Targets:
    """Returns what the text encoders of one CLIP are packed to.

    Args:
        pack_to: as for `model_targets`.
        paths: of their files or folders.
        device: where they run.

    Raises:
        WeightFileError: as for `model_targets`.
    """
    def weights_of(contents: Contents) -> Weights:
        return _weights(contents, encoder_comfy_keys(contents)[0])

    def rooms(memory: Memory, workspace: int) -> tuple[int, int]:
        return memory.for_encoder(workspace), memory.for_encoder()

    return _targets(pack_to, paths, device, weights_of, rooms)


def _targets(pack_to: str | None, paths: Sequence[str], device: torch.device,
             weights_of: Callable[[Contents], Weights],
             rooms: Callable[[Memory, int], tuple[int, int]],
             multiplies_int8: bool = False) -> Targets:
    """rooms: memory, workspace -> arguments of `choose`; it is called after `weights_of`."""
    size = size_of_target(pack_to) if pack_to else None
    if pack_to != FIT and (size is None or len(paths) == 1):
        return Targets((pack_to,) * len(paths))
    contents = [file_contents(path) for path in paths]
    files = [weights_of(each) for each in contents]
    if size is not None:
        return Targets(tuple(map(size_target, shares(size, files))))
    memory = Memory.of(device)
    workspace = max(workspace_bytes(file.shapes) for file in files)
    choice = choose(files, *rooms(memory, workspace), multiplies_int8)
    names = join_some([each.name for each in contents])
    if choice.missing and memory.is_shared:
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
        return f"Fits {memory.text} as it is: {room} are for the weights."
    fixed = choice.target
    if isinstance(choice.target, int):
        fixed = f"size in GB, {choice.target / GB:.{DIGITS}f},"
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
