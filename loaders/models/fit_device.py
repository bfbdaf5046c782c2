"""Chooses what the files of a model are packed to, so that it fits the device it runs on.

What is chosen is what the other options of the loaders' `pack_to` are too: the files as they are, a
type, or a size.
"""
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE

from ...ops.layers import fast_by_kitchen
from ...ops.packing.pack_types import TYPES
from ...ops.tensor.packed_layout import is_packed
from ..byte_sizes import GB, size_text
from ..comfyui.compute import AUTOMATIC, FAST, host_multiplies, packed_formats
from ..comfyui.contents import Contents, diffusion_comfy_keys, encoder_comfy_keys, file_contents
from ..container.weight_file import WeightFileError
from ..devices import total_memory
from ..name_lists import join_some
from ..packing.calibration.measure import usual_steps
from ..packing.layer_losses import measuring_advice
from ..packing.planning.for_device import (
    FAST_FORMAT,
    FAST_TYPE,
    FLOOR,
    Choice,
    Memory,
    Sizes,
    Weights,
    choose,
    experts_of,
    is_video,
    longer_step,
    shares,
    smaller_model,
    step_memory,
    step_seconds,
    step_tokens,
)
from ..packing.planning.plan import DIGITS, relative_error
from ..packing_rules import Shapes
from ..quantizers.comfy_quant import row_type_of
from .pack_on_load import PackedFrom, PackTo, measurement_of

FIT = "fit this GPU"  # in place of a type to pack to
FIT_KEY = "featherweight_fit"  # attachment of a patcher: its `Targets`


@dataclass(frozen=True)
class Targets:
    """What the files of a model are packed to.

    Attributes:
        files: for each file what it is packed to, None for the file as it is.
        text: what was chosen for a device, and how it is the same on every device; "" where
            nothing was chosen.
        copying: what each step is expected to copy, and how much longer it takes; "" for nothing.
    """

    files: tuple[PackTo | None, ...]
    text: str = ""
    copying: str = ""

    def attach(self, patcher):
        """Attaches the targets to the host's ModelPatcher, whose clones keep them."""
        if self.text:
            patcher.set_attachments(FIT_KEY, self)


def fit_text(patcher) -> str:
    """Returns what was chosen for a model, "" where nothing was."""
    targets = patcher.get_attachment(FIT_KEY)
    return targets.text if targets else ""


def copying_text(patcher) -> str:
    """Returns what was expected that each step of a model copies, "" where nothing was."""
    targets = patcher.get_attachment(FIT_KEY)
    return targets.copying if targets else ""


def model_targets(pack_to: PackTo | None, paths: Sequence[str], device: torch.device,
                  formats: Container[str]) -> Targets:
    """Returns what a diffusion model is packed to.

    Args:
        pack_to: None, FIT, a type, or a number of bytes for all files together.
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
    return _model_targets(pack_to, paths, files, device, config, FAST_FORMAT not in formats)


def loaded_targets(file: PackedFrom, stored: Mapping[str, torch.Tensor], shapes: Shapes,
                   device: torch.device, config: BASE, fixed: Container[str]) -> Targets:
    """Returns what a diffusion model in memory is packed to, so that it fits a device.

    Args:
        file: see `pack_weights`.
        stored: its weights, by the host's names.
        shapes: of the weights, with patches.
        device: where it runs.
        config: the host's configuration of the model.
        fixed: names of weights that stay as they are.

    Raises:
        WeightFileError: as for `model_targets`.
    """
    measured, _ = measurement_of(file, shapes)
    weights = Weights.of(shapes, stored, measured.costs if measured else None, fixed)
    formats = packed_formats(AUTOMATIC, device)
    return _model_targets(FIT, [file.name], [weights], device, config, FAST_FORMAT not in formats)


def faster_type_text(patcher: ModelPatcher, compute: str) -> str | None:
    """Returns a sentence on a type of `pack to` that is faster than "fast" is; None for none.

    Args:
        patcher: the host's, of a model that was loaded with `compute`.
        compute: one of `COMPUTE_CHOICES`.
    """
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    if (compute != FAST or not host_multiplies(FAST_FORMAT, device)
            or fast_by_kitchen.why_not_fast(device, dtype)):
        return None
    weights = [weight for weight in patcher.model.diffusion_model.parameters()
               if is_packed(weight) and weight.ndim == 2 and row_type_of(weight) is None]
    size = sum(TYPES[FAST_TYPE].nbytes(tuple(weight.shape)) for weight in weights)
    if not weights or size > total_memory(device):
        return None
    return (f"With {FAST_TYPE} at `pack to` ({size_text(size)}) ComfyUI's kernels compute it,"
            " which is faster than fast is with this file.")


def _model_targets(pack_to: PackTo | None, paths: Sequence[str], files: Sequence[Weights],
                   device: torch.device, config: BASE | None, multiplies_int8: bool) -> Targets:
    step = step_memory(config) if config else None
    memory = Memory.of(device)
    room_for = partial(memory.for_model, step[0] if step else None, experts=experts_of(config))
    return _targets(pack_to, paths, files, memory, device, room_for, config, multiplies_int8)


def encoder_targets(pack_to: PackTo | None, paths: Sequence[str], device: torch.device) -> Targets:
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
    return _targets(pack_to, paths, files, memory, device, memory.for_encoder)


def _is_fixed(pack_to: PackTo | None, paths: Sequence[str]) -> bool:
    """Returns whether each file is packed to the same, whatever is in it."""
    return pack_to is None or (pack_to != FIT and (
        not isinstance(pack_to, int) or len(paths) == 1))


def _targets(pack_to: PackTo | None, paths: Sequence[str], files: Sequence[Weights], memory: Memory,
             device: torch.device, room_for: Callable[[int], int], config: BASE | None = None,
             multiplies_int8: bool = False) -> Targets:
    """room_for: as for `choose`."""
    if isinstance(pack_to, int):
        return Targets(shares(pack_to, files))
    sizes = Sizes(files)
    choice = choose(sizes, room_for, multiplies_int8, memory.for_copying(config))
    if choice.copied and memory.is_shared:
        names = join_some([os.path.basename(os.path.normpath(path)) for path in paths])
        raise WeightFileError(
            f"{names}: the weights take {size_text(choice.room + choice.copied, DIGITS)},"
            f" {size_text(choice.copied, DIGITS)} more than there is for them on {memory.text},"
            " even with the smallest types. Use a smaller model, or choose a type at pack to, if"
            " you know that the memory is enough.")
    if isinstance(choice.target, int):
        targets = shares(choice.target, files)
    else:
        targets = (choice.target or None,) * len(files)
    tokens, copying = step_tokens(config) if config else 0, ""
    if choice.copied:
        copying = f"{size_text(choice.copied, DIGITS)} copied in each step"
        share = longer_step(choice.copied, sizes.values, tokens, device)
        copying += "" if share is None else f", about {share:.0%} longer (estimate)"
    texts = [_text(choice, memory, copying)]
    if config and choice.lack and (smaller := smaller_model(sizes.values, is_video(config))):
        texts.append(f"A smaller model, such as {smaller}, gives better images.")
    if config and choice.grade and not sizes.is_measured:
        seconds = step_seconds(sizes.values, tokens, device)
        texts.append(measuring_advice(relative_error(choice.grade),
                                      seconds and seconds * usual_steps(len(sizes.matrices))))
    return Targets(targets, " ".join(filter(None, texts)), copying)


def _text(choice: Choice, memory: Memory, copying: str) -> str:
    room = size_text(choice.room)
    if not (choice.target or copying):
        return f"The file fits unchanged: its weights may take {room} of {memory.text}."
    texts = [f"For {memory.text}, which leaves {room} for the weights:"]
    if not choice.target:
        texts.append("they stay as in the file.")
    elif isinstance(choice.target, str):
        texts.append(f"{choice.target} at pack to gives the same on every device.")
    else:
        texts.append(f"{choice.grade_text}. mix for a size, {choice.target / GB:.{DIGITS}f} GB,"
                     " at pack to gives the same on every device.")
    if copying:
        texts.append(f"{copying}: Place Model (Featherweight) shows it.")
    if choice.lack:
        texts.append(f"{FLOOR}, which loses less, takes {size_text(choice.lack)} more than there"
                     " is for it in main memory.")
    return " ".join(texts)


def _weights(contents: Contents, tensors: dict[str, torch.Tensor], prefix: str = "") -> Weights:
    """Returns the weights of a file; tensors: by the host's names, with this prefix."""
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in tensors.items()
              if name.startswith(prefix)}
    stored = {name.removeprefix(prefix): tensor for name, tensor in contents.tensors.items()
              if name.startswith(prefix)}
    measured, _ = measurement_of(contents.file, shapes) if contents.file else (None, None)
    return Weights.of(shapes, stored, measured.costs if measured else None)
