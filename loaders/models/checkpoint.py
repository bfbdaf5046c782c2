"""Loads checkpoints: diffusion model, text encoder and VAE of one file or diffusers folder."""
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.model_detection import model_config_from_unet

from ...ops.bounded_json import read_json
from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters, pack_layers
from ...ops.log import log
from ...ops.tensor.packed_layout import is_packed
from ..comfyui.comfy_quant_weights import as_tensors, host_metadata
from ..comfyui.compute import EXACT, encoder_formats, packed_formats
from ..comfyui.detection import UNKNOWN_MODEL, explain_build_errors, try_detect
from ..comfyui.keep_packed import wrap_clip, wrap_model
from ..comfyui.load_check import NOTES_KEY, bytes_of, check_load, load_notes, patcher_of
from ..comfyui.unknown_model import reject_unknown_model
from ..comfyui.weight_keys import model_prefix
from ..container.weight_file import WeightFile, WeightFileError, map_file, safe_repr
from ..devices import device_options
from ..families import MODELS
from ..files.diffusers_folder import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDER, file_inside
from ..files.open_weights import open_weights
from ..progress import Progress
from ..recipe import register_loader
from ..refusals.wrong_kind import VAE_PREFIXES, reject_non_diffusion
from .diffusion import build_model, load_diffusion_model, read_weights
from .fit_device import FIT, Targets, model_targets
from .load_options import LoadOptions
from .loader_choice import is_safetensors, needs_own_reader
from .text_encoder import load_text_encoder
from .vae import load_vae, wrap_vae

# names of the loaders in recipes
MODEL = "diffusion model of a checkpoint"
CLIP = "text encoder of a checkpoint"
VAE = "VAE of a checkpoint"


def load_checkpoint(path: str, embedding_directory: list[str] | None = None,
                    output_model: bool = True, output_clip: bool = True, output_vae: bool = True,
                    device: torch.device | None = None, encoder_device: torch.device | None = None,
                    **options: Any) -> tuple:
    """Loads a checkpoint and keeps its packed weights packed.

    A file without packed weights goes to the host's own loader, unless it is to be packed.

    Args:
        path: of a file or a diffusers folder.
        embedding_directory: folders of textual inversions.
        output_model, output_clip, output_vae: whether to load the part.
        device: where model and VAE run; None: the host's choice.
        encoder_device: where the text encoder runs; None: the host's choice.
        options: of `LoadOptions`, without `model_options`. Only the model is packed; for a VAE the
            host has no choice of dynamic VRAM.

    Returns:
        (model patcher, CLIP, VAE); None for a part that is not requested. If the file lacks one,
        the CLIP is None and the VAE an object of the host's that raises an error when it is used.

    Raises:
        WeightFileError: if the file cannot be read or holds no known model.
    """
    asked = replace(LoadOptions(**options), model_options=device_options(device))
    for_host = {  # in the words of ComfyUI's own loader
        "embedding_directory": embedding_directory, "disable_dynamic": asked.disable_dynamic,
        "output_model": output_model, "output_clip": output_clip, "output_vae": output_vae,
        "model_options": dict(asked.model_options),
        "te_model_options": device_options(encoder_device)}
    computing_device = device or comfy.model_management.get_torch_device()
    formats = packed_formats(asked.host_formats, computing_device)
    other_formats = encoder_formats(
        asked.host_formats, encoder_device or comfy.model_management.text_encoder_device())
    is_folder = os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json"))
    targets = Targets((asked.pack_to,))
    if asked.pack_to == FIT and not is_folder:
        targets = (model_targets(FIT, [path], computing_device, formats) if output_model
                   else Targets((None,)))
    [target] = targets.files
    parts = None
    if not needs_own_reader(path, target, formats, other_formats):
        parts = _load_by_the_host(path, for_host)
    is_read_here = parts is None
    if parts is None and is_folder:
        parts = _load_folder(path, asked, for_host)
    elif parts is None:
        parts = _load_file(path, replace(asked, pack_to=target), for_host, formats,
                           other_formats, computing_device)
    model, clip, vae = parts
    if model is not None:
        targets.attach(model)
    # When the host reloads a part by itself, it forgets the devices.
    is_special = is_read_here or bool(device or encoder_device or targets.text)
    for name, part in ((MODEL, model), (CLIP, clip), (VAE, vae)):
        patcher = patcher_of(part)
        if patcher is not None and (is_special or (asked.disable_dynamic and name != VAE)):
            asked.recipe(name, path, embedding_directory=embedding_directory, device=device,
                         encoder_device=encoder_device).attach(patcher)
    return model, clip, vae


def _load_by_the_host(path: str, for_host: dict[str, Any]):
    """Returns model, CLIP and VAE, None where the host does not know the model as it is named."""
    try:
        with check_load(os.path.basename(path), nbytes=os.path.getsize(path)) as check:
            parts = comfy.sd.load_checkpoint_guess_config(path, **for_host)[:3]
            check.attach(*parts)
    except RuntimeError as error:
        if not (str(error).startswith(UNKNOWN_MODEL) and is_safetensors(path)):
            raise
        return None
    return parts


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


def _load_folder(path: str, asked: LoadOptions, for_host: dict[str, Any]):
    names = (*MODEL_FOLDERS, *ENCODER_FOLDERS, VAE_FOLDER)
    folders = {name: os.path.join(path, name) for name in names
               if os.path.isfile(os.path.join(path, name, "config.json"))}
    model_folder = next((folders[name] for name in MODEL_FOLDERS if name in folders), None)
    if model_folder is None:
        raise WeightFileError(
            f"{os.path.basename(path)} is not a diffusers folder: it has no folder 'transformer'"
            " or 'unet' with a config.json. Pick the folder that has, or a checkpoint file.")
    model = clip = vae = None
    if for_host["output_model"]:
        model = load_diffusion_model(model_folder, **vars(asked))
        further = Path(f"{model_folder}_2")  # of Wan 2.2: the model of the last steps
        if (further / "config.json").is_file():
            note = (f"{os.path.basename(path)} has a second model, {further.name}, which a"
                    " checkpoint's loader has no output for: load that folder with Load Diffusion"
                    " Model (GGUF, Featherweight).")
            log.warning("%s", note)
            model.set_attachments(NOTES_KEY, (*load_notes(model), note))
    encoders = [folders[name] for name in ENCODER_FOLDERS if name in folders]
    if for_host["output_clip"] and encoders:
        as_stored = replace(asked, model_options=for_host["te_model_options"], pack_to=None,
                            compute=EXACT)
        clip = load_text_encoder(encoders, _clip_type(path, len(encoders)),
                                 for_host["embedding_directory"], **vars(as_stored))
    if for_host["output_vae"]:
        vae = (load_vae(folders[VAE_FOLDER], asked.device, asked.compute)
               if VAE_FOLDER in folders else _no_vae())
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


def _load_file(path: str, asked: LoadOptions, for_host: dict[str, Any], formats: frozenset[str],
               other_formats: frozenset[str], device: torch.device):
    file = open_weights(path)
    reject_non_diffusion(file)
    pack_to = asked.pack_to if for_host["output_model"] else None
    progress = Progress("reading", *(["packing"] if pack_to else []), "building the model")
    state_dict, config, packed = read_weights(file, pack_to, progress, formats, device)
    if model_prefix(state_dict):
        model, clip, vae = _build_parts(file, state_dict, asked.compute, for_host, other_formats)
    else:
        model = build_model(file, state_dict, asked, config)
        clip, vae = None, _no_vae() if for_host["output_vae"] else None
    if packed and model is not None:
        packed.attach(model)
    progress.stage()
    return model, clip, vae


def _build_parts(file: WeightFile, state_dict: dict[str, torch.Tensor], compute: str,
                 for_host: dict[str, Any], other_formats: frozenset[str]):
    prefix = model_prefix(state_dict)
    if try_detect(model_config_from_unet, state_dict, prefix, metadata=host_metadata(file)) is None:
        reject_unknown_model(file, state_dict,
                             "holds no checkpoint that this ComfyUI knows")
    weights = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    others = as_tensors(file, {name: tensor for name, tensor in state_dict.items()
                               if name not in weights}, formats=other_formats)
    state_dict = weights | others
    encoder_weights = {name: tensor for name, tensor in others.items()
                       if not name.startswith(VAE_PREFIXES)}
    encoder_options, model_options = for_host["te_model_options"], for_host["model_options"]
    if any(map(is_packed, encoder_weights.values())):
        encoder_options = encoder_options | {
            "custom_operations": operations_for(encoder_weights, full_precision=True)}
    model_options = model_options | {"custom_operations": operations_for(weights,
                                                                         compute=compute)}
    for_host = for_host | {"te_model_options": encoder_options, "model_options": model_options}
    is_vae_packed = any(is_packed(tensor) for name, tensor in state_dict.items()
                        if name.startswith(VAE_PREFIXES))

    def build(state_dict, **outputs) -> Sequence[Any]:
        with (
            explain_build_errors(file.name),
            dequantize_plain_parameters(),
            check_load(file.name, file.notes, bytes_of(state_dict)) as check,
        ):
            parts = comfy.sd.load_state_dict_guess_config(
                state_dict, metadata=host_metadata(file), **for_host | outputs)
            assert parts is not None  # as for a model that the host does not detect
            check.attach(*parts[:3])
        return parts

    if is_vae_packed and for_host["output_vae"]:
        model, clip, *_ = build(dict(state_dict), output_vae=False)
        with pack_layers():
            vae = build(state_dict, output_model=False, output_clip=False)[2]
    else:
        model, clip, vae, *_ = build(state_dict)
    if model is not None:
        wrap_model(model, file, compute)
    if clip is not None:
        wrap_clip(clip)
    return model, clip, vae and wrap_vae(vae, compute)
