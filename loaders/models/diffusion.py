"""Loads diffusion models from weight files and folders as the host's own, with packed weights."""
import contextlib
import os
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters
from ...ops.log import log
from ..comfyui.comfy_quant_weights import (
    as_tensors,
    host_metadata,
    in_parts,
    pack_plain_fp8,
    read_marked,
)
from ..comfyui.compute import EXACT, packed_formats
from ..comfyui.detection import (
    DETECTION_ERRORS,
    UNKNOWN_MODEL,
    explain_build_errors,
    explain_missing_config,
    is_diffusion_model,
    reject_endless_blocks,
    shape_mismatch_text,
)
from ..comfyui.diffusers_keys import reject_incomplete
from ..comfyui.host_patcher import keep_weights_whole
from ..comfyui.keep_packed import wrap_model
from ..comfyui.load_check import bytes_of, check_load
from ..comfyui.module_files import (
    explain_module_errors,
    join_module,
    module_layers,
    reject_unused_module,
)
from ..comfyui.unknown_model import reject_unknown_model
from ..comfyui.weight_keys import detect_keys, has_foreign_names, model_prefix
from ..container.weight_file import WeightFile, WeightFileError
from ..devices import CPU
from ..files.open_weights import open_weights
from ..lora.seedvr2 import add_texts
from ..progress import Progress
from ..quantizers.comfy_quant_marks import MARK
from ..recipe import register_loader
from ..refusals.wrong_kind import reject_non_diffusion
from .fit_device import model_targets
from .load_options import LoadOptions
from .loader_choice import has_plain_fp8, needs_own_reader, shapes_in
from .pack_on_load import PackStats, PackTo, may_have_host_formats, pack_weights

DIFFUSION_MODEL = "diffusion model"


@register_loader(DIFFUSION_MODEL)
def load_diffusion_model(path: str, extra: str | None = None,
                         **options: Any) -> comfy.model_patcher.ModelPatcher:
    """Loads a diffusion model and keeps its packed weights packed.

    A file without packed weights goes to the host's own loader, unless it is to be packed.

    Args:
        path: of a file or folder; of a whole checkpoint only the model is loaded.
        extra: path of a module: a file with further layers of the model, such as VACE's.
        options: of `LoadOptions`.

    Raises:
        WeightFileError: if the file cannot be read or holds no known diffusion model.
    """
    asked = LoadOptions(**options)
    recipe = asked.recipe(DIFFUSION_MODEL, path, extra=extra)
    device = asked.device or comfy.model_management.get_torch_device()
    formats = packed_formats(asked.host_formats, device)
    targets = model_targets(asked.pack_to, [path, extra] if extra else [path], device, formats)
    pack_to = targets.files[0]
    keeps_fp8 = device.type == "cpu" and pack_to is None and has_plain_fp8(path)
    if not (needs_own_reader(path, pack_to, formats) or extra or keeps_fp8):
        patcher = _load_by_the_host(path, asked)
        if patcher is not None:
            targets.attach(patcher)
            needs_recipe = asked.disable_dynamic or targets.text
            return recipe.attach(patcher) if needs_recipe else patcher
    file = open_weights(path)
    reject_non_diffusion(file)
    stages = [stage for target in targets.files
              for stage in ("reading", target and "packing") if stage]
    progress = Progress(*stages, "building the model")
    state_dict, config, packed = read_weights(file, pack_to, progress, formats, device)
    if keeps_fp8:
        state_dict = pack_plain_fp8(state_dict)
    prefix = model_prefix(state_dict)
    module = {}
    if extra:
        module_file = open_weights(extra)
        module, _, packed_module = read_weights(module_file, targets.files[1], progress,
                                                packed_formats(EXACT, device), device)
        module = module_layers(module_file, module)
        state_dict = join_module(state_dict, prefix, module)
        packed = PackStats.merge([packed, packed_module])
    add_texts(state_dict, prefix, path, config)
    with explain_module_errors(path, extra) if extra else contextlib.nullcontext():
        files = dict.fromkeys(module, os.path.basename(extra)) if extra else None
        patcher = build_model(file, state_dict, asked, None if extra else config, files)
    if extra:
        reject_unused_module(patcher, module, path, extra)
    if packed:
        packed.attach(patcher)
    targets.attach(patcher)
    progress.stage()
    return recipe.attach(patcher)


def _load_by_the_host(path: str,
                      asked: LoadOptions) -> comfy.model_patcher.ModelPatcher | None:
    """Returns the model, None where the host does not know it as it is in the file."""
    left_over = reject_incomplete(os.path.basename(path), shapes_in(path))
    try:
        with check_load(os.path.basename(path), nbytes=os.path.getsize(path)) as check:
            patcher = comfy.sd.load_diffusion_model(path, model_options=dict(asked.model_options),
                                                    disable_dynamic=asked.disable_dynamic)
            check.attach(patcher)
            check.leave_over(left_over)
        keep_weights_whole(patcher)
        return patcher
    except WeightFileError:
        raise
    except DETECTION_ERRORS as error:
        if isinstance(error, RuntimeError) and (
                not str(error).startswith(UNKNOWN_MODEL)
                and shape_mismatch_text(error) is None):
            raise
        log.debug("ComfyUI does not load %s", path, exc_info=True)
        return None


def read_weights(
        file: WeightFile, pack_to: PackTo | None, progress: Progress, formats: frozenset[str],
        device: torch.device = CPU
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, PackStats | None]:
    """Reads the weights of a diffusion model or of a whole checkpoint.

    Args:
        file: of the weights.
        pack_to: type that the model's plain weights are packed to; None: they stay as in the file.
        progress: advances by one stage, or by two with `pack_to`.
        formats: ComfyUI's own whose layers become packed tensors; with another `pack_to`, all do.
        device: packs the weights.

    Returns:
        The state dict with the host's names, the `unet_config` that the host detects by them, or
        None, and what was packed, or None without `pack_to`.

    Raises:
        WeightFileError: if a layer is damaged or in a format that this host does not read.
    """
    reject_endless_blocks(file)
    state_dict = read_marked(file, progress.track)
    if pack_to is None:
        if any(name.endswith(MARK) for name in state_dict) and has_foreign_names(state_dict):
            # weights of several layers become one, of one format and scale for each row
            if formats != packed_formats(EXACT, torch.device("cpu")):
                file.note(f"{file.name} has diffusers' names: its quantized layers are"
                          " computed by this pack, exactly, and not by ComfyUI.")
            state_dict = as_tensors(file, state_dict, model_prefix(state_dict))
        else:
            state_dict = as_tensors(file, state_dict, model_prefix(state_dict), formats)
        return *detect_keys(state_dict), None
    prefix = model_prefix(state_dict)
    state_dict, config = detect_keys(as_tensors(file, state_dict, prefix), lazy=True)
    packed = pack_weights(file, state_dict, pack_to, progress, prefix, device)
    if may_have_host_formats(pack_to):
        state_dict = in_parts(state_dict, formats)
    return state_dict, config, packed


def build_model(file: WeightFile, state_dict: dict[str, torch.Tensor], asked: LoadOptions,
                config: Mapping[str, Any] | None,
                files: Mapping[str, str] | None = None) -> comfy.model_patcher.ModelPatcher:
    """Builds the host's diffusion model from the weights of a file.

    Args:
        file: of the weights.
        state_dict: of `file`, with the host's names.
        asked: of the host's options it takes the devices.
        config: of `read_weights`; None also where other weights have joined them.
        files: see `check_load`.

    Raises:
        WeightFileError: if the host detects no diffusion model.
    """
    options = {key: value for key, value in asked.model_options.items()
               if key.endswith("_device")}
    options["custom_operations"] = operations_for(state_dict, compute=asked.compute)
    patcher = None
    if config is not None or is_diffusion_model(state_dict):
        with (
            explain_missing_config(file),
            explain_build_errors(file.name),
            dequantize_plain_parameters(),
            check_load(file.name, file.notes, bytes_of(state_dict), files) as check,
        ):
            if config is None:
                check.leave_over(reject_incomplete(file.name, state_dict))
            patcher = comfy.sd.load_diffusion_model_state_dict(
                state_dict, model_options=options, metadata=host_metadata(file),
                disable_dynamic=asked.disable_dynamic)
            check.attach(patcher)
    if patcher is None:
        reject_unknown_model(file, state_dict)
    wrap_model(patcher, file, asked.compute)
    return patcher
