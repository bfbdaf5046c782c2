"""Diffusion models: a weight file or folder -> the host's own model, with packed weights."""
import os
import re
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch

from ..ops.load_hooks import bare_parameters_unpacked
from .detection import is_known, misfits_told
from .diffusers_names import half_converted_refused
from .files import open_weights
from .files.container import WeightFile, WeightFileError
from .handover import in_the_hosts_formats, is_ours, model_prefix, operations_for, take_back, text_metadata
from .model_names import in_the_hosts_names
from .packing.while_loading import read_weights
from .progress import Progress
from .recipe import Recipe, loads

DIFFUSION_MODEL = "diffusion model"
CHECKPOINT_PREFIX = "model.diffusion_model."


@loads(DIFFUSION_MODEL)
def load_diffusion_model(path: str, value_dtype: torch.dtype | None = None, patch_dtype: torch.dtype | None = None,
                         compute: str = "exact", disable_dynamic: bool = False, pack_to: str | None = None,
                         model_options: Mapping[str, Any] | None = None,
                         extra: str | None = None) -> comfy.model_patcher.ModelPatcher:
    """Load a diffusion model file or folder with its packed weights kept packed.

    value_dtype, patch_dtype, compute: see `PackedLayer`. disable_dynamic: keep the model out of dynamic VRAM. pack_to: one of
    `packing.while_loading.TYPES`, to which the weights that are not packed yet are packed as they are read. model_options: the
    host's, such as `load_device`; its `dtype` is for files that are left to the host. extra: a file with further layers of the
    model, such as VACE's. Of a whole checkpoint only the model is used. Files without packed weights go to the host's own
    loader where none is to be packed. Raises WeightFileError.
    """
    model_options = dict(model_options or {})
    recipe = Recipe(DIFFUSION_MODEL, (str(path),), {
        "value_dtype": value_dtype, "patch_dtype": patch_dtype, "compute": compute, "disable_dynamic": disable_dynamic,
        "pack_to": pack_to, **({"model_options": model_options} if model_options else {}),
        **({"extra": extra} if extra else {})})
    if not is_ours(path, pack_to) and not extra:
        patcher = comfy.sd.load_diffusion_model(path, model_options=model_options, disable_dynamic=disable_dynamic)
        return recipe.attach(patcher) if disable_dynamic else patcher
    file = open_weights(path)
    refuse_other_kinds(file)
    progress = Progress(stages=3 if pack_to else 2)
    state_dict, packed = read_weights(file, pack_to, progress)
    if extra:
        state_dict |= _further_layers(extra, model_prefix(state_dict))
    devices = {key: value for key, value in model_options.items() if key.endswith("_device")}
    patcher = model_of(file, state_dict, value_dtype, patch_dtype, compute, disable_dynamic, devices)
    if packed:
        packed.attach(patcher)
    progress.stage()
    return recipe.attach(patcher)


def _further_layers(path: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a file with more layers of a model whose names begin with `prefix`; of a checkpoint, its model's."""
    weights = in_the_hosts_names(open_weights(path).state_dict())
    of_the_model = {name.removeprefix(CHECKPOINT_PREFIX): weight for name, weight in weights.items()
                    if name.startswith(CHECKPOINT_PREFIX)}
    return {prefix + name: weight for name, weight in (of_the_model or weights).items()}


def model_of(file: WeightFile, state_dict: dict[str, torch.Tensor], value_dtype: torch.dtype | None = None,
             patch_dtype: torch.dtype | None = None, compute: str = "exact", disable_dynamic: bool = False,
             model_options: Mapping[str, Any] | None = None) -> comfy.model_patcher.ModelPatcher:
    """The diffusion model among the weights of a file.

    state_dict: the file's, in the host's names. model_options: the host's. Raises WeightFileError when there is none.
    """
    state_dict = in_the_hosts_formats(file, state_dict)
    options = {**(model_options or {}),
               "custom_operations": operations_for(state_dict, value_dtype, patch_dtype, compute=compute)}
    patcher = None
    if is_known(state_dict):
        with misfits_told(file), bare_parameters_unpacked(), half_converted_refused(file, state_dict):
            patcher = comfy.sd.load_diffusion_model_state_dict(
                state_dict, model_options=options, metadata=text_metadata(file), disable_dynamic=disable_dynamic)
    if patcher is None:
        raise WeightFileError(
            f"{os.path.basename(file.path)} holds no diffusion model that this ComfyUI knows"
            f" (architecture {file.metadata.get('general.architecture', 'not named')!r}, {len(file.entries)} tensors, first"
            f" {next(iter(file.entries), 'none')!r}). Update ComfyUI if the model is new, or pick another file.")
    take_back(patcher, file, compute)
    return patcher


# What tells other kinds of files from a diffusion model: a tensor name, what the file is, and what to do with it.
OTHER_KINDS = (
    (r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|^text_model\.embeddings\.|^(model|encoder)\.embed_tokens\.",
     "a text encoder", "Pick it in Load Text Encoder (Featherweight)."),
    (r"^(v\.blk|mm)\.", "the vision part (mmproj) of a text encoder",
     "Pick it in Load Text Encoder (Featherweight), under mmproj."),
    (r"\.lora_(a|b|A|B|up|down)(\.weight)?$", "a LoRA", "Load a model here and put the LoRA in a LoRA loader behind it."),
)


def refuse_other_kinds(file: WeightFile):
    """Raise WeightFileError for a text encoder, mmproj or LoRA picked as a diffusion model."""
    for pattern, kind, advice in OTHER_KINDS:
        found = next((name for name in file.entries if re.search(pattern, name)), None)
        if found is not None:
            raise WeightFileError(
                f"{os.path.basename(file.path)} is {kind} (it has {found!r}), expected a diffusion model. {advice}")
