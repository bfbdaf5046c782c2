"""Models as diffusers keeps them, made of the host's own by the host's own tables, and by hand
where those lack names."""
import re

import comfy.utils
import pytest
import torch

from featherweight.loaders.comfyui.diffusers_keys import from_diffusers

# Of one table for both: the names that only one of diffusers' Flux and Flux.2 has.
OF_FLUX = re.compile(
    r"\.ff(_context)?\.net\.|^single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)\.")
OF_FLUX2 = re.compile(
    r"\.linear_(in|out)\.|^single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)\.")


def flux(config):
    return {
        name: target for name, target in comfy.utils.flux_to_diffusers(config).items()
        if not OF_FLUX2.search(name)
    }


def flux2(config):
    """As `convert_flux2_transformer_checkpoint_to_diffusers` of diffusers 0.42 names them."""
    table = {
        name.replace("time_text_embed", "time_guidance_embed"): target
        for name, target in comfy.utils.flux_to_diffusers(config).items()
        if not OF_FLUX.search(name)
    }
    modulations = (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
    return table | {f"{name}.linear.weight": f"{name}.lin.weight" for name in modulations}


def chroma(config):
    """As `ChromaTransformer2DModel` of diffusers 0.42 names them."""
    guidance = ["in_proj", "out_proj", *(f"norms.{layer}" for layer in range(config["n_layers"]))]
    names = dict(zip(guidance, guidance))
    for layer in (f"layers.{number}" for number in range(config["n_layers"])):
        names |= {
            f"{layer}.linear_1": f"{layer}.in_layer", f"{layer}.linear_2": f"{layer}.out_layer"
        }
    return flux(config) | {
        f"distilled_guidance_layer.{name}.{end}": f"distilled_guidance_layer.{target}.{end}"
        for name, target in names.items()
        for end in ("weight", "bias")
    }


# Names of the host's layers for those of diffusers.
DIFFUSERS = {
    "flux-dev": flux, "flux2": flux2, "chroma": chroma,
    "sd3.5": lambda config: comfy.utils.mmdit_to_diffusers(
        {**config, "num_blocks": config["depth"]}), "aura-flow": comfy.utils.auraflow_to_diffusers,
    "pixart-sigma": comfy.utils.pixart_to_diffusers, "z-image": comfy.utils.z_image_to_diffusers
}


def _places(weights, table):
    """(name in diffusers, host's name, dimension with start and length there or None, what changes
    the values or None)."""
    for name, target in table.items():
        target, place, change = (
            (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        )
        if target in weights:
            yield name, target, place, change


def in_diffusers_names(weights, table):
    """The weights as diffusers keeps them: q, k and v apart, shift and scale swapped."""
    stored = {}
    for name, target, place, change in _places(weights, table):
        values = weights[target] if place is None else weights[target].narrow(*place)
        stored[name] = change(values) if change else values
    return stored


def in_the_hosts_names(stored, weights, table):
    """The values of `stored`, which `in_diffusers_names` made of `weights`, in the names and shapes
    of those."""
    whole = {name: values.clone() for name, values in weights.items()}
    for name, target, place, change in _places(weights, table):
        values = change(stored[name]) if change else stored[name]  # a swap undoes itself
        (whole[target] if place is None else whole[target].narrow(*place)).copy_(values)
    return whole


WAN_TEXT = 4096  # of the text


def wan_shapes(columns=36, **kwargs):
    """Name -> shape in diffusers' class, of the size of the small models of `families`."""
    diffusers = pytest.importorskip("diffusers", reason="it has the names")
    model_class = diffusers.WanTransformer3DModel  # imports: tables of modules are no meta tensors
    with torch.device("meta"):
        model = model_class(
            num_attention_heads=2, attention_head_dim=128, in_channels=columns, out_channels=16,
            text_dim=WAN_TEXT, freq_dim=256, ffn_dim=512, num_layers=1, **kwargs)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def wan_names(shapes):
    """Host's name -> diffusers' name."""
    numbers = {name: torch.tensor(number) for number, name in enumerate(shapes)}
    names = list(shapes)
    return {name: names[number] for name, number in from_diffusers(numbers).items()}
