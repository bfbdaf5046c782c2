"""Checkpoints: diffusion model, text encoder and VAE in one file or package -> the host's own
three, with packed weights."""
import json
import os

import comfy.model_patcher
import comfy.sd
import torch
from comfy.model_detection import model_config_from_unet

from ..ops.load_hooks import dequantize_plain_parameters
from ..ops.operations import operations_for
from ..ops.packed_layout import is_packed
from .comfy_bridge import wrap_clip, wrap_model
from .comfy_keys import model_prefix
from .detection import explain_shape_errors, reject_non_diffusion, try_detect
from .devices import device_options
from .diffusion import build_model, load_diffusion_model, read_weights, to_comfy_quant_layout
from .files import open_weights
from .files.container import WeightFile, WeightFileError, safe_repr
from .progress import Progress
from .reader_choice import needs_own_reader
from .recipe import Recipe, register_loader
from .text_encoder import load_text_encoder
from .vae import wrap_vae

MODEL, CLIP, VAE = (f"{part} of a checkpoint"
                    for part in ("diffusion model", "text encoder", "VAE"))

VAE_PREFIXES = ("first_stage_model.", "vae.")

# Folders of a package as diffusers saves it.
MODEL_FOLDERS = ("transformer", "unet")
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
# What the host calls the text encoders of a pipeline, by how the pipeline's name begins; the first
# that fits.
CLIP_TYPES = {
    "flux2": "flux2", "flux": "flux", "stablediffusion3": "sd3", "pixart": "pixart", "wan": "wan",
    "skyreelsv2": "wan", "ltx": "ltxv", "mochi": "mochi", "chroma": "chroma",
    "hunyuanvideo15": "hunyuan_video_15", "hunyuanvideo": "hunyuan_video",
    "hunyuanimage": "hunyuan_image", "hunyuandit": "hunyuan_dit", "lumina": "lumina2",
    "zimage": "lumina2", "qwenimage": "qwen_image", "hidreamimage": "hidream",
    "cogvideox": "cogvideox", "cosmostext": "cosmos", "cosmosvideo": "cosmos",
    "cosmos2text": "cosmos", "cosmos2video": "cosmos", "ovisimage": "ovis",
    "longcatimage": "longcat_image", "kandinsky5t2i": "kandinsky5_image",
    "kandinsky5i2i": "kandinsky5_image", "kandinsky5": "kandinsky5", "omnigen2": "omnigen2",
    "stableaudio": "stable_audio", "stablecascade": "stable_cascade", "ideogram4": "ideogram4",
    "krea2": "krea2", "joyimage": "joyimage"
}


def load_checkpoint(path: str, embedding_directory: list[str] | None = None,
                    output_model: bool = True, output_clip: bool = True, output_vae: bool = True,
                    disable_dynamic: bool = False, compute: str = "exact",
                    pack_to: str | None = None, device: torch.device | None = None,
                    encoder_device: torch.device | None = None) -> tuple:
    """Load (model patcher, CLIP, VAE) from one file or package of diffusers, with its packed
    weights kept packed.

    What the file lacks: CLIP is None, and the VAE an object of the host's; both make the host say
    so where they are used. What is not asked for is None. disable_dynamic: keep model and CLIP out
    of dynamic VRAM; the host has no such choice for a VAE. compute: of the model, see
    `PackedLayer`. pack_to: see `load_diffusion_model`; text encoder and VAE stay as they are in the
    file. device: where model and VAE run, encoder_device: where the text encoder does; None: where
    the host has them. Files without packed weights go to the host's own loader where none is to be
    packed. Raises WeightFileError.
    """
    outputs = {"output_model": output_model, "output_clip": output_clip, "output_vae": output_vae}
    ours = needs_own_reader(path, pack_to)
    devices = (
        {"device": device, "encoder_device": encoder_device} if device or encoder_device else {}
    )
    if not ours:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            path, embedding_directory=embedding_directory, disable_dynamic=disable_dynamic,
            model_options=device_options(device), te_model_options=device_options(encoder_device),
            **outputs)
    elif os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        model, clip, vae = _package(path, embedding_directory, outputs, disable_dynamic, compute,
                                    pack_to, **devices)
    else:
        model, clip, vae = _file(path, embedding_directory, outputs, disable_dynamic, compute,
                                 pack_to, **devices)
    ours = ours or bool(devices)  # the host's own way to load a part again knows nothing of them
    options = {
        "embedding_directory": embedding_directory, "disable_dynamic": disable_dynamic,
        "pack_to": pack_to, **devices
    }
    if model is not None and (ours or disable_dynamic):
        Recipe(MODEL, (str(path),), {**options, "compute": compute}).attach(model)
    if clip is not None and (ours or disable_dynamic):
        Recipe(CLIP, (str(path),), options).attach(clip.patcher)
    if ours and getattr(vae, "patcher", None) is not None:
        Recipe(VAE, (str(path),), options).attach(vae.patcher)
    return model, clip, vae


# Each part again, for recipes.

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
    """What the host gives for a checkpoint without a VAE: its first use raises a sentence about
    that."""
    return comfy.sd.VAE(sd={})


def _package(path: str, embedding_directory, outputs: dict, disable_dynamic: bool, compute: str,
             pack_to: str | None, device: torch.device | None = None,
             encoder_device: torch.device | None = None):
    folders = {name: os.path.join(path, name) for name in (*MODEL_FOLDERS, *ENCODER_FOLDERS, "vae")
               if os.path.isfile(os.path.join(path, name, "config.json"))}
    models = [folders[name] for name in MODEL_FOLDERS if name in folders]
    if not models:
        raise WeightFileError(
            f"{os.path.basename(path)} is no package of diffusers: it has no folder 'transformer'"
            " or 'unet' with a config.json. Pick the folder that has, or a checkpoint file.")
    model = clip = vae = None
    if outputs["output_model"]:
        model = load_diffusion_model(models[0], compute=compute, disable_dynamic=disable_dynamic,
                                     pack_to=pack_to, model_options=device_options(device))
    encoders = [folders[name] for name in ENCODER_FOLDERS if name in folders]
    if outputs["output_clip"] and encoders:
        clip = load_text_encoder(encoders, _clip_type(path, len(encoders)), embedding_directory,
                                 disable_dynamic=disable_dynamic,
                                 model_options=device_options(encoder_device))
    if outputs["output_vae"]:
        with dequantize_plain_parameters():
            vae = (
                wrap_vae(comfy.sd.VAE(sd=open_weights(folders["vae"]).state_dict(), device=device))
                if "vae" in folders
                else _no_vae()
            )
    return model, clip, vae


def _clip_type(path: str, encoders: int) -> str:
    """The loaders' name for the set of text encoders of a package, by the pipeline it was saved
    from.

    encoders: how many it has. Raises WeightFileError for several of a pipeline of which nothing is
    known.
    """
    has_unet = os.path.isdir(os.path.join(path, "unet"))
    try:
        with open(os.path.join(path, "model_index.json"), encoding="utf-8") as file:
            pipeline = str(json.load(file).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        pipeline = "" if has_unet else "Flux"
    known = next((kind for start, kind in CLIP_TYPES.items() if pipeline.lower().startswith(start)),
                 None)
    # those with a U-Net are Stable Diffusion's and its relatives'
    if known is None and encoders > 1 and not has_unet:
        raise WeightFileError(
            f"{os.path.basename(path)} was saved from the pipeline {safe_repr(pipeline)}, whose"
            f" {encoders} text encoders are of no known set. Load its folders one by one: the"
            " model with Load Diffusion Model, the text encoders with Load Text Encoder"
            " (Featherweight).")
    return known or "stable_diffusion"


def _file(path: str, embedding_directory, outputs: dict, disable_dynamic: bool, compute: str,
          pack_to: str | None, device: torch.device | None = None,
          encoder_device: torch.device | None = None):
    file = open_weights(path)
    reject_non_diffusion(file)
    pack_to = pack_to if outputs["output_model"] else None
    progress = Progress(stages=3 if pack_to else 2)
    state_dict, packed = read_weights(file, pack_to, progress)
    if model_prefix(state_dict):
        parts = _parts(file, state_dict, embedding_directory, outputs, disable_dynamic, compute,
                       device_options(device), device_options(encoder_device))
    else:
        model = build_model(file, state_dict, disable_dynamic=disable_dynamic, compute=compute,
                         model_options=device_options(device))
        parts = model, None, _no_vae()
    if packed and parts[0] is not None:
        packed.attach(parts[0])
    progress.stage()
    return parts


def _parts(file: WeightFile, state_dict: dict[str,
                                              torch.Tensor], embedding_directory, outputs: dict,
           disable_dynamic: bool, compute: str, model_options: dict, encoder_options: dict):
    prefix = model_prefix(state_dict)
    state_dict = to_comfy_quant_layout(file, state_dict)
    if try_detect(model_config_from_unet, state_dict, prefix, metadata=file.text_metadata) is None:
        raise WeightFileError(
            f"{os.path.basename(file.path)} holds no checkpoint that this ComfyUI knows"
            f" ({len(file.entries)} tensors, first {next(iter(file.entries), 'none')!r}). Update"
            " ComfyUI if the model is new, or pick another file."
        )
    encoder = {
        name: tensor for name, tensor in state_dict.items()
        if not name.startswith((prefix, *VAE_PREFIXES))
    }
    if any(map(is_packed, encoder.values())):
        encoder_options["custom_operations"] = operations_for(encoder, full_precision=True)
    model_options["custom_operations"] = operations_for(
        [name for name in state_dict if name.startswith(prefix)], compute=compute)
    with explain_shape_errors(file), dequantize_plain_parameters():
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            state_dict, embedding_directory=embedding_directory, metadata=file.text_metadata,
            model_options=model_options, te_model_options=encoder_options,
            disable_dynamic=disable_dynamic, **outputs)
    if model is not None:
        wrap_model(model, file, compute)
    if clip is not None:
        wrap_clip(clip)
    return model, clip, vae and wrap_vae(vae)
