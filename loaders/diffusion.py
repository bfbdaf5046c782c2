"""Diffusion models: a weight file or folder -> the host's own model, with packed weights."""
import os
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ..ops.load_hooks import dequantize_plain_parameters
from ..ops.operations import operations_for
from ..ops.packed_layout import is_packed
from .comfy_bridge import wrap_model
from .comfy_keys import model_prefix, to_comfy_keys
from .comfy_quant import as_tensors, reject_unread_layers
from .detection import explain_shape_errors, is_diffusion_model, reject_non_diffusion
from .diffusers_keys import reject_partial_conversion
from .files import open_weights
from .files.container import WeightFile, WeightFileError
from .pack_on_load import Packed, pack_weights
from .progress import Progress
from .reader_choice import needs_own_reader
from .recipe import Recipe, register_loader

DIFFUSION_MODEL = "diffusion model"
CHECKPOINT_PREFIX = "model.diffusion_model."


@register_loader(DIFFUSION_MODEL)
def load_diffusion_model(path: str, value_dtype: torch.dtype | None = None,
                         patch_dtype: torch.dtype | None = None, compute: str = "exact",
                         disable_dynamic: bool = False, pack_to: str | None = None,
                         model_options: Mapping[str, Any] | None = None,
                         extra: str | None = None) -> comfy.model_patcher.ModelPatcher:
    """Load a diffusion model file or folder with its packed weights kept packed.

    value_dtype, patch_dtype, compute: see `PackedLayer`. disable_dynamic: keep the model out of
    dynamic VRAM. pack_to: one of `pack_on_load.TYPES`, to which the weights that are not packed yet
    are packed as they are read. model_options: the host's, such as `load_device`; its `dtype` is
    for files that are left to the host. extra: a file with further layers of the model, such as
    VACE's. Of a whole checkpoint only the model is used. Files without packed weights go to the
    host's own loader where none is to be packed. Raises WeightFileError.
    """
    model_options = dict(model_options or {})
    recipe = Recipe(
        DIFFUSION_MODEL, (str(path),), {
            "value_dtype": value_dtype, "patch_dtype": patch_dtype, "compute": compute,
            "disable_dynamic": disable_dynamic, "pack_to": pack_to,
            **({"model_options": model_options} if model_options else {}),
            **({"extra": extra} if extra else {})
        })
    if not needs_own_reader(path, pack_to) and not extra:
        patcher = comfy.sd.load_diffusion_model(path, model_options=model_options,
                                                disable_dynamic=disable_dynamic)
        return recipe.attach(patcher) if disable_dynamic else patcher
    file = open_weights(path)
    reject_non_diffusion(file)
    progress = Progress(stages=3 if pack_to else 2)
    state_dict, packed = read_weights(file, pack_to, progress)
    if extra:
        state_dict |= _extra_layers(extra, model_prefix(state_dict))
    devices = {key: value for key, value in model_options.items() if key.endswith("_device")}
    patcher = build_model(file, state_dict, value_dtype, patch_dtype, compute, disable_dynamic,
                          devices)
    if packed:
        packed.attach(patcher)
    progress.stage()
    return recipe.attach(patcher)


def _extra_layers(path: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a file with more layers of a model whose names begin with `prefix`; of a
    checkpoint, its model's."""
    weights = to_comfy_keys(open_weights(path).state_dict())
    of_the_model = {name.removeprefix(CHECKPOINT_PREFIX): weight for name, weight in weights.items()
                    if name.startswith(CHECKPOINT_PREFIX)}
    return {prefix + name: weight for name, weight in (of_the_model or weights).items()}


def read_weights(file: WeightFile, pack_to: str | None,
                 progress: Progress) -> tuple[dict[str, torch.Tensor], Packed | None]:
    """Read the weights of a diffusion model or of a whole checkpoint.

    Args:
        file: of them.
        pack_to: the type that the model's weights are packed to, or None: as they are in the file.
        progress: gets a stage, or two with `pack_to`.

    Returns:
        the state dict in the host's names, and what was packed, or None.

    Raises:
        WeightFileError: where a layer is in a format that this host does not read, or not right.
    """
    state_dict = file.state_dict(progress.track)
    if pack_to is None:
        reject_unread_layers(file, state_dict)
        return to_comfy_keys(state_dict), None
    prefix = model_prefix(state_dict)
    state_dict = to_comfy_keys(as_tensors(file, state_dict, prefix), later=True)
    return state_dict, pack_weights(file, state_dict, pack_to, progress, prefix)


def to_comfy_quant_layout(file: WeightFile,
                          state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict whose layers in the host's quantised formats have a `comfy_quant` each.

    That is what the host makes of `scaled_fp8` and of metadata in files that it reads itself. A
    state dict with packed weights stays as it is.
    """
    if any(map(is_packed, state_dict.values())):
        return state_dict
    return comfy.utils.convert_old_quants(state_dict, model_prefix=model_prefix(state_dict),
                                          metadata=file.text_metadata)[0]


def build_model(file: WeightFile, state_dict: dict[str, torch.Tensor],
                value_dtype: torch.dtype | None = None, patch_dtype: torch.dtype | None = None,
                compute: str = "exact", disable_dynamic: bool = False,
                model_options: Mapping[str, Any] | None = None) -> comfy.model_patcher.ModelPatcher:
    """The diffusion model among the weights of a file.

    state_dict: the file's, in the host's names. model_options: the host's. Raises WeightFileError
    when there is none.
    """
    state_dict = to_comfy_quant_layout(file, state_dict)
    options = {
        **(model_options or {}), "custom_operations": operations_for(state_dict, value_dtype,
                                                                     patch_dtype, compute=compute)
    }
    patcher = None
    if is_diffusion_model(state_dict):
        with explain_shape_errors(file), dequantize_plain_parameters(), reject_partial_conversion(
                file, state_dict):
            patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options,
                                                               metadata=file.text_metadata,
                                                               disable_dynamic=disable_dynamic)
    if patcher is None:
        raise WeightFileError(
            f"{os.path.basename(file.path)} holds no diffusion model that this ComfyUI knows"
            f" (architecture {file.metadata.get('general.architecture', 'not named')!r},"
            f" {len(file.entries)} tensors, first {next(iter(file.entries), 'none')!r}). Update"
            " ComfyUI if the model is new, or pick another file."
        )
    wrap_model(patcher, file, compute)
    return patcher
