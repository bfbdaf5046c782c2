"""Loads checkpoints: diffusion model, text encoder and VAE of one file or diffusers folder."""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.model_detection import model_config_from_unet

from ...ops.bounded_json import read_json
from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters, pack_layers
from ...ops.tensor.packed_layout import is_packed
from ..comfyui.detection import (
    UNKNOWN_MODEL,
    VAE_PREFIXES,
    explain_build_errors,
    reject_non_diffusion,
    try_detect,
)
from ..comfyui.load_check import bytes_of, check_load
from ..comfyui.packed_patcher import wrap_clip, wrap_model
from ..comfyui.quantized_weights import as_tensors, host_metadata, read_marked
from ..comfyui.weight_keys import model_prefix
from ..comfyui.who_computes import AUTOMATIC, packed_formats
from ..container.weight_file import WeightFile, WeightFileError, map_file, safe_repr
from ..devices import device_options
from ..families import MODELS
from ..files.diffusers_folder import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDER, file_inside
from ..files.open_weights import open_weights
from ..progress import Progress
from ..recipe import Recipe, register_loader
from .diffusion import build_model, load_diffusion_model, read_weights
from .fit_device import FIT, Targets, model_targets
from .loader_choice import is_safetensors, needs_own_reader
from .text_encoder import load_text_encoder
from .vae import build_vae, wrap_vae

# names of the loaders in recipes
MODEL = "diffusion model of a checkpoint"
CLIP = "text encoder of a checkpoint"
VAE = "VAE of a checkpoint"


def load_checkpoint(path: str, embedding_directory: list[str] | None = None,
                    output_model: bool = True, output_clip: bool = True, output_vae: bool = True,
                    disable_dynamic: bool = False, compute: str = "exact",
                    pack_to: str | None = None, device: torch.device | None = None,
                    encoder_device: torch.device | None = None,
                    host_formats: str = AUTOMATIC) -> tuple:
    """Loads a checkpoint and keeps its packed weights packed.

    A file without packed weights goes to the host's own loader, unless it is to be packed.

    Args:
        path: of a file or a diffusers folder.
        embedding_directory: folders of textual inversions.
        output_model, output_clip, output_vae: whether to load the part.
        disable_dynamic: keep model and CLIP out of dynamic VRAM; the host has no such choice for a
            VAE.
        compute: one of `compute_dtype.COMPUTE`.
        pack_to: see `load_diffusion_model`; text encoder and VAE stay as they are in the file.
        device: where model and VAE run; None: the host's choice.
        encoder_device: where the text encoder runs; None: the host's choice.
        host_formats: one of `who_computes.HOST_FORMATS`.

    Returns:
        (model patcher, CLIP, VAE); None for a part that is not requested. If the file lacks one,
        the CLIP is None and the VAE an object of the host's that raises an error when it is used.

    Raises:
        WeightFileError: if the file cannot be read or holds no known model.
    """
    outputs = {"output_model": output_model, "output_clip": output_clip, "output_vae": output_vae}
    formats = _Formats(
        packed_formats(host_formats, device or comfy.model_management.get_torch_device()),
        packed_formats(host_formats,
                       encoder_device or comfy.model_management.text_encoder_device()))
    is_folder = os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json"))
    targets = Targets((pack_to,))
    if pack_to == FIT and not is_folder:
        targets = Targets((None,))
        if output_model:
            targets = model_targets(
                pack_to, [path], device or comfy.model_management.get_torch_device(), formats.model)
    [target] = targets.files
    use_own_reader = needs_own_reader(path, target, formats.model | formats.encoder)
    devices = {}
    if device or encoder_device:
        devices = {"device": device, "encoder_device": encoder_device}
    parts = None
    if not use_own_reader:
        parts = _load_by_the_host(path, embedding_directory, outputs, disable_dynamic, device,
                                  encoder_device)
        use_own_reader = parts is None
    if parts is not None:
        model, clip, vae = parts
    elif is_folder:
        model, clip, vae = _load_folder(path, embedding_directory, outputs, disable_dynamic,
                                        compute, target, host_formats, **devices)
    else:
        model, clip, vae = _load_file(path, embedding_directory, outputs, disable_dynamic,
                                      compute, target, formats, **devices)
    # When the host reloads a part by itself, it forgets the devices.
    needs_recipe = use_own_reader or bool(devices) or bool(targets.text)
    options = {
        "embedding_directory": embedding_directory, "disable_dynamic": disable_dynamic,
        "pack_to": pack_to, **devices,
        **({"host_formats": host_formats} if host_formats != AUTOMATIC else {})
    }
    if model is not None:
        targets.attach(model)
    if model is not None and (needs_recipe or disable_dynamic):
        Recipe(MODEL, (str(path),), {**options, "compute": compute}).attach(model)
    if clip is not None and (needs_recipe or disable_dynamic):
        Recipe(CLIP, (str(path),), options).attach(clip.patcher)
    vae_patcher = getattr(vae, "patcher", None)
    if needs_recipe and vae_patcher is not None:
        Recipe(VAE, (str(path),), {**options, "compute": compute}).attach(vae_patcher)
    return model, clip, vae


def _load_by_the_host(path: str, embedding_directory, outputs: dict, disable_dynamic: bool,
                      device: torch.device | None, encoder_device: torch.device | None):
    """Returns model, CLIP and VAE, None where the host does not know the model as it is named."""
    try:
        with check_load(os.path.basename(path), nbytes=os.path.getsize(path)) as check:
            parts = comfy.sd.load_checkpoint_guess_config(
                path, embedding_directory=embedding_directory, disable_dynamic=disable_dynamic,
                model_options=device_options(device),
                te_model_options=device_options(encoder_device), **outputs)[:3]
            check.attach(*parts)
    except RuntimeError as error:
        if not (str(error).startswith(UNKNOWN_MODEL) and is_safetensors(path)):
            raise
        return None
    return parts


class _Formats(NamedTuple):
    """Names of ComfyUI's own formats that this pack computes in a part of a checkpoint."""

    model: frozenset[str]
    encoder: frozenset[str]


# The loaders that recipes call, one for each part.

@register_loader(MODEL)
def _model_patcher(path: str, **options) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, output_clip=False, output_vae=False, **options)[0]


@register_loader(CLIP)
def _clip_patcher(path: str, **options) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, output_model=False, output_vae=False, **options)[1].patcher


@register_loader(VAE)
def _vae_patcher(path: str, **options) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, output_model=False, output_clip=False, **options)[2].patcher


def _no_vae() -> comfy.sd.VAE:
    """Returns the host's VAE of a checkpoint without one; using it raises an error that says so."""
    return comfy.sd.VAE(sd={})


def _load_folder(path: str, embedding_directory, outputs: dict, disable_dynamic: bool,
                 compute: str, pack_to: str | None, host_formats: str,
                 device: torch.device | None = None, encoder_device: torch.device | None = None):
    names = (*MODEL_FOLDERS, *ENCODER_FOLDERS, VAE_FOLDER)
    folders = {name: os.path.join(path, name) for name in names
               if os.path.isfile(os.path.join(path, name, "config.json"))}
    model_folder = next((folders[name] for name in MODEL_FOLDERS if name in folders), None)
    if model_folder is None:
        raise WeightFileError(
            f"{os.path.basename(path)} is not a diffusers folder: it has no folder 'transformer'"
            " or 'unet' with a config.json. Pick the folder that has, or a checkpoint file.")
    model = clip = vae = None
    if outputs["output_model"]:
        model = load_diffusion_model(model_folder, compute=compute,
                                     disable_dynamic=disable_dynamic, pack_to=pack_to,
                                     model_options=device_options(device),
                                     host_formats=host_formats)
    encoders = [folders[name] for name in ENCODER_FOLDERS if name in folders]
    if outputs["output_clip"] and encoders:
        clip = load_text_encoder(encoders, _clip_type(path, len(encoders)), embedding_directory,
                                 disable_dynamic=disable_dynamic,
                                 model_options=device_options(encoder_device),
                                 host_formats=host_formats)
    if outputs["output_vae"] and VAE_FOLDER in folders:
        file = open_weights(folders[VAE_FOLDER])
        weights = read_marked(file)
        name = f"{os.path.basename(path)}/{VAE_FOLDER}"
        vae = wrap_vae(build_vae(weights, device, name=name, notes=file.notes), compute)
    elif outputs["output_vae"]:
        vae = _no_vae()
    return model, clip, vae


def _clip_type(path: str, encoder_count: int) -> str:
    """Returns the CLIP type for the pipeline that a diffusers folder was saved from.

    Raises:
        WeightFileError: if it has several text encoders and an unknown pipeline.
    """
    has_unet = os.path.isdir(os.path.join(path, "unet"))
    try:
        index = read_json(bytes(map_file(file_inside(Path(path), "model_index.json"))))
        pipeline = str(index.get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        pipeline = "" if has_unet else "Flux"
    starts = {start: model.clip_type for model in MODELS for start in model.pipelines
              if pipeline.lower().startswith(start)}
    clip_type = starts[max(starts, key=len)] if starts else None
    # Pipelines with a U-Net are Stable Diffusion and its relatives.
    if clip_type is None and encoder_count > 1 and not has_unet:
        raise WeightFileError(
            f"{os.path.basename(path)} was saved from the pipeline {safe_repr(pipeline)}, and its"
            f" {encoder_count} text encoders are not a known set. Load its folders one by one: the"
            " model with Load Diffusion Model, the text encoders with Load Text Encoder"
            " (GGUF, Featherweight).")
    return clip_type or "stable_diffusion"


def _load_file(path: str, embedding_directory, outputs: dict, disable_dynamic: bool, compute: str,
               pack_to: str | None, formats: "_Formats", device: torch.device | None = None,
               encoder_device: torch.device | None = None):
    file = open_weights(path)
    reject_non_diffusion(file)
    pack_to = pack_to if outputs["output_model"] else None
    progress = Progress("reading", *(["packing"] if pack_to else []), "building the model")
    state_dict, packed = read_weights(file, pack_to, progress, formats.model,
                                      device or comfy.model_management.get_torch_device())
    if model_prefix(state_dict):
        model, clip, vae = _build_parts(file, state_dict, embedding_directory, outputs,
                                        disable_dynamic, compute, device_options(device),
                                        device_options(encoder_device), formats.encoder)
    else:
        model = build_model(file, state_dict, disable_dynamic=disable_dynamic, compute=compute,
                            model_options=device_options(device))
        clip, vae = None, _no_vae() if outputs["output_vae"] else None
    if packed and model is not None:
        packed.attach(model)
    progress.stage()
    return model, clip, vae


def _build_parts(file: WeightFile, state_dict: dict[str, torch.Tensor], embedding_directory,
                 outputs: dict, disable_dynamic: bool, compute: str, model_options: dict,
                 encoder_options: dict, encoder_formats: frozenset[str]):
    prefix = model_prefix(state_dict)
    if try_detect(model_config_from_unet, state_dict, prefix, metadata=host_metadata(file)) is None:
        raise WeightFileError(
            f"{file.name} holds no checkpoint that this ComfyUI knows"
            f" ({len(file.entries)} tensors, first {next(iter(file.entries), 'none')!r}). Update"
            " ComfyUI if the model is new, or pick another file."
        )
    encoder_weights = {
        name: tensor for name, tensor in state_dict.items()
        if not name.startswith((prefix, *VAE_PREFIXES))
    }
    if encoder_formats:
        state_dict = {
            name: tensor for name, tensor in state_dict.items() if name not in encoder_weights
        }
        encoder_weights = as_tensors(file, encoder_weights, formats=encoder_formats)
        state_dict |= encoder_weights
    if any(map(is_packed, encoder_weights.values())):
        encoder_options["custom_operations"] = operations_for(encoder_weights, full_precision=True)
    model_options["custom_operations"] = operations_for(
        {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)},
        compute=compute)
    is_vae_packed = any(is_packed(tensor) for name, tensor in state_dict.items()
                        if name.startswith(VAE_PREFIXES))

    def build(state_dict, **outputs) -> Sequence[Any]:
        with (
            explain_build_errors(file.name),
            dequantize_plain_parameters(),
            check_load(file.name, file.notes, bytes_of(state_dict)) as check,
        ):
            parts = comfy.sd.load_state_dict_guess_config(
                state_dict, embedding_directory=embedding_directory,
                metadata=host_metadata(file), model_options=model_options,
                te_model_options=encoder_options, disable_dynamic=disable_dynamic, **outputs)
            assert parts is not None  # as for a model that the host does not detect
            check.attach(*parts[:3])
        return parts

    if is_vae_packed and outputs["output_vae"]:
        model, clip, *_ = build(dict(state_dict), **outputs | {"output_vae": False})
        with pack_layers():
            vae = build(state_dict, output_model=False, output_clip=False)[2]
    else:
        model, clip, vae, *_ = build(state_dict, **outputs)
    if model is not None:
        wrap_model(model, file, compute)
    if clip is not None:
        wrap_clip(clip)
    return model, clip, vae and wrap_vae(vae, compute)
