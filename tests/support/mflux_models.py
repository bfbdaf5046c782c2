"""Diffusion models as mflux saves them: folders of files named by numbers, under its own names."""
import json
import re
from pathlib import Path

from conformance.mlx import affine_parts
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import FAMILIES, random_weights
from safetensors.torch import save_file

LEVEL, VERSION = "quantization_level", "mflux_version"
# family -> (name in diffusers or of the host -> what mflux calls it)
NAMES = {
    "flux-dev": [(r"(transformer_blocks\.\d+\.ff(?:_context)?)\.net\.0\.proj\.", r"\1.linear1."),
                 (r"(transformer_blocks\.\d+\.ff(?:_context)?)\.net\.2\.", r"\1.linear2.")],
    "flux2-klein": [(r"time_guidance_embed\.timestep_embedder\.", "time_guidance_embed."),
                    (r"^(transformer_blocks\.\d+\.attn\.to_out)\.0\.", r"\1.")],
    "qwen-image": [(r"\.attn\.to_out\.0\.", ".attn.attn_to_out.0."),
                   (r"\.(img|txt)_mod\.1\.", r".\1_mod_linear."),
                   (r"\.(img|txt)_mlp\.net\.0\.proj\.", r".\1_ff.mlp_in."),
                   (r"\.(img|txt)_mlp\.net\.2\.", r".\1_ff.mlp_out.")],
    "z-image": [(r"^t_embedder\.mlp\.0\.", "t_embedder.linear1."),
                (r"^t_embedder\.mlp\.2\.", "t_embedder.linear2."),
                (r"^(all_final_layer\..+\.adaLN_modulation)\.1\.", r"\1.0.")],
    "krea2": [(r"^tmlp\.0\.", "tmlp.linear_in."), (r"^tmlp\.2\.", "tmlp.linear_out."),
              (r"^tproj\.1\.", "tproj.linear."), (r"^txtmlp\.0\.", "txtmlp.norm."),
              (r"^txtmlp\.1\.", "txtmlp.linear_in."), (r"^txtmlp\.3\.", "txtmlp.linear_out.")],
}
TABLES = {"flux2-klein": "flux2"}  # family -> that whose names in diffusers it has


def mflux_name(family: str, name: str) -> str:
    for pattern, replacement in NAMES[family]:
        name = re.sub(pattern, replacement, name)
    return name


def write_folder(name: str, folder: Path, bits: int = 4, rename=mflux_name):
    """Writes a family's model, and returns its values in the host's names.

    rename: mflux's name of (family, name in diffusers).
    """
    weights, table = random_weights(FAMILIES[name]), TABLES.get(name, name)
    names = DIFFUSERS[table](FAMILIES[name].config) if table in DIFFUSERS else None
    plain = in_diffusers_names(weights, names) if names else weights
    stored, values = {}, {}
    for key, value in plain.items():
        layer, _, part = rename(name, key).rpartition(".")
        parts, values[key] = {part: value}, value
        if part == "weight" and value.ndim == 2 and value.shape[1] % 64 == 0:
            parts, values[key] = affine_parts(value, bits)
        stored |= {f"{layer}.{each}" if layer else each: tensor.contiguous()
                   for each, tensor in parts.items()}
    folder.mkdir()
    metadata, places = {LEVEL: str(bits), VERSION: "0.24.0"}, {}
    half = list(stored)[:len(stored) // 2]
    for number, keys in enumerate((half, [key for key in stored if key not in half])):
        save_file({key: stored[key] for key in keys}, folder / f"{number}.safetensors", metadata)
        places |= dict.fromkeys(keys, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": metadata, "weight_map": places}))
    return in_the_hosts_names(values, weights, names) if names else values

