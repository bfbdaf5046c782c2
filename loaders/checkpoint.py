"""Checkpoints: diffusion model, text encoder and VAE in one file -> the host's own three, with packed weights."""
import logging
import os

import comfy.model_patcher
import comfy.sd
import torch
from comfy.model_detection import model_config_from_unet, unet_prefix_from_state_dict

from ..ops.linear import bare_parameters_unpacked
from ..ops.patcher import adopt
from ..ops.tensor import is_packed
from .container import WeightFile, WeightFileError, open_weights
from .diffusion import fix_keys, is_ours, model_of, operations_for, refuse_other_kinds, renamed, report, text_metadata

log = logging.getLogger(__name__)

VAE_PREFIXES = ("first_stage_model.", "vae.")


def load_checkpoint(path: str, embedding_directory: list[str] | None = None, output_model: bool = True,
                    output_clip: bool = True, output_vae: bool = True, disable_dynamic: bool = False) -> tuple:
    """Load (model patcher, CLIP, VAE) from one file, with its packed weights kept packed.

    What the file lacks: CLIP is None, and the VAE an object of the host's; both make the host say so where they are used.
    What is not asked for is None. Files without packed weights go to the host's own loader. Raises WeightFileError.
    """
    outputs = {"output_model": output_model, "output_clip": output_clip, "output_vae": output_vae}
    if not is_ours(path):
        return comfy.sd.load_checkpoint_guess_config(
            path, embedding_directory=embedding_directory, disable_dynamic=disable_dynamic, **outputs)[:3]
    file = open_weights(path)
    refuse_other_kinds(file)
    state_dict = fix_keys(file.state_dict())
    if not is_checkpoint(state_dict):
        model = model_of(file, renamed(state_dict), disable_dynamic=disable_dynamic)
        clip, vae = None, comfy.sd.VAE(sd={})  # its first use raises the host's sentence about a checkpoint without one
    else:
        model, clip, vae = _parts(file, state_dict, embedding_directory, outputs, disable_dynamic)
    options = (path, embedding_directory)
    if model is not None:
        model.cached_patcher_init = (_model_patcher, options)
    if clip is not None:
        clip.patcher.cached_patcher_init = (_clip_patcher, options)
    if vae is not None and getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (_vae_patcher, options)
    return model, clip, vae


def is_checkpoint(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the model's weights carry a checkpoint's prefix. The host drops our operations where they do not."""
    prefix = unet_prefix_from_state_dict(state_dict)
    return sum(name.startswith(prefix) for name in state_dict) > 5


def _parts(file: WeightFile, state_dict: dict[str, torch.Tensor], embedding_directory, outputs: dict, disable_dynamic: bool):
    prefix = unet_prefix_from_state_dict(state_dict)
    if model_config_from_unet(state_dict, prefix, metadata=text_metadata(file)) is None:
        raise WeightFileError(
            f"{os.path.basename(file.path)} holds no checkpoint that this ComfyUI knows ({len(file.entries)} tensors,"
            f" first {next(iter(file.entries), 'none')!r}). Update ComfyUI if the model is new, or pick another file.")
    encoder = {name: tensor for name, tensor in state_dict.items() if not name.startswith((prefix, *VAE_PREFIXES))}
    encoder_options = {"custom_operations": operations_for(encoder)} if any(map(is_packed, encoder.values())) else {}
    model_options = {"custom_operations": operations_for({name: None for name in state_dict if name.startswith(prefix)})}
    with bare_parameters_unpacked():
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            state_dict, embedding_directory=embedding_directory, metadata=text_metadata(file),
            model_options=model_options, te_model_options=encoder_options, disable_dynamic=disable_dynamic, **outputs)
    if model is not None:
        log.info("[Featherweight] %s", report(file, adopt(model)))
    if clip is not None:
        adopt(clip.patcher)
    return model, clip, vae


# What the host calls to have a part of a checkpoint once more, for another device or outside of dynamic VRAM.

def _model_patcher(path, embedding_directory, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, embedding_directory, output_clip=False, output_vae=False, disable_dynamic=disable_dynamic)[0]


def _clip_patcher(path, embedding_directory, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, embedding_directory, output_model=False, output_vae=False,
                           disable_dynamic=disable_dynamic)[1].patcher


def _vae_patcher(path, embedding_directory, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_checkpoint(path, embedding_directory, output_model=False, output_clip=False,
                           disable_dynamic=disable_dynamic)[2].patcher
