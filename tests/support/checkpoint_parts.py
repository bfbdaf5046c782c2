"""Parts of checkpoints, small where the host lets them be, and a whole one of the SD1.5 kind."""
import functools
import hashlib

import comfy.sd1_clip
import torch
from families import FAMILIES, random_weights

from devtools.files import tiny_models

MODEL, ENCODER, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
SD15 = FAMILIES["sd1.5"]


def flux() -> dict[str, torch.Tensor]:
    values = tiny_models.flux(0, hidden=256, double_blocks=1, single_blocks=1, context=256)
    return {name: torch.from_numpy(value) for name, value in values.items()}


def autoencoder() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()}


@functools.cache
def clip_l() -> dict[str, torch.Tensor]:
    """CLIP-L, whose size the host holds fixed. Layers of one shape have equal values, which makes
    it quickly."""
    model, values = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float32), {}
    weights = {}
    for name, param in model.clip_l.state_dict().items():
        if name.startswith("transformer.text_model."):
            shape, norm = tuple(param.shape), "norm" in name and name.endswith("weight")
            if (shape, norm) not in values:
                generator = torch.Generator().manual_seed(len(values))
                values[shape, norm] = (torch.randn(shape, generator=generator) * 0.03 + norm).half()
            weights[name] = values[shape, norm].clone()  # a safetensors file shares nothing
    return weights


@functools.cache
def quantised_parts() -> dict:
    """What `quantise_once` has quantised."""
    return {}


def quantise_once(tensor: torch.Tensor, *options):
    """`quantised` of bitsandbytes' files, which takes seconds for a CLIP-L, once for all layers and
    files of the same values."""
    from devtools.files.bnb_files import quantised

    digest = hashlib.sha1(tensor.contiguous().view(torch.uint8).numpy()).digest()
    key = (digest, tensor.shape, tensor.dtype, options)
    if key not in quantised_parts():
        quantised_parts()[key] = quantised(tensor, *options)
    parts, values = quantised_parts()[key]
    return {name: value.clone() for name, value in parts.items()}, values


def with_prefixes(**parts):
    prefixes = {"model": MODEL, "encoder": ENCODER, "vae": VAE}
    return {
        prefixes[part] + name: value for part, values in parts.items()
        for name, value in values.items()
    }


def checkpoint_shapes() -> dict[str, tuple]:
    """Name -> shape in a whole checkpoint of the SD1.5 kind with the VAE of another."""
    parts = {MODEL: {name: tuple(value.shape) for name, value in random_weights(SD15).items()},
             f"{ENCODER}transformer.": tiny_models.clip_l_shapes(),
             VAE: {name: value.shape for name, value in tiny_models.autoencoder().items()}}
    return {prefix + name: shape for prefix, shapes in parts.items()
            for name, shape in shapes.items()}


def stable_diffusion() -> dict[str, torch.Tensor]:
    """A whole checkpoint of the SD1.5 kind, with a small model."""
    vae = autoencoder()
    for name in ("taesd_decoder.1.weight", "taesd_encoder.14.weight", "taesd_encoder.14.bias"):
        axis = 1 if "decoder" in name else 0
        vae[name] = vae[name].narrow(axis, 0, 4).contiguous()
    return with_prefixes(model=random_weights(SD15), encoder=clip_l(), vae=vae)
