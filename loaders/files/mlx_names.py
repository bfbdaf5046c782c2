"""Gives weights that mflux or MLX's libraries saved the names of diffusers and transformers.

mflux saves a model as folders of a pipeline (`transformer`, `text_encoder` ...) without a
`config.json`: files named by numbers, whose metadata and index have its version. MLX's libraries
keep the folders of transformers.

Source: mflux 0.24 `models/*/weights/*_weight_mapping.py`, mlx-vlm 0.3 `models/*/`.
"""
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..container.weight_file import DOWNLOAD_AGAIN, TensorEntry, WeightFileError, safe_repr

MFLUX = ("mflux_version", "quantization_level")  # keys of the metadata of its files
RGB = 3  # channels
# regular expression for a part of a name -> what takes its place
_OF_MFLUX = (
    (r"^(transformer_blocks\.\d+\.ff(?:_context)?)\.linear1\.", r"\1.net.0.proj."),  # Flux
    (r"^(transformer_blocks\.\d+\.ff(?:_context)?)\.linear2\.", r"\1.net.2."),
    (r"^time_guidance_embed\.linear_", "time_guidance_embed.timestep_embedder.linear_"),  # Flux.2
    (r"^(transformer_blocks\.\d+\.attn\.to_out)\.(?=[a-z])", r"\1.0."),
    (r"\.attn\.attn_to_out\.", ".attn.to_out."),  # Qwen-Image
    (r"^(transformer_blocks\.\d+\.(?:img|txt)_mod)_linear\.", r"\1.1."),
    (r"^(transformer_blocks\.\d+\.(?:img|txt))_ff\.mlp_in\.", r"\1_mlp.net.0.proj."),
    (r"^(transformer_blocks\.\d+\.(?:img|txt))_ff\.mlp_out\.", r"\1_mlp.net.2."),
    (r"^t_embedder\.linear1\.", "t_embedder.mlp.0."),  # Z-Image
    (r"^t_embedder\.linear2\.", "t_embedder.mlp.2."),
    (r"^(all_final_layer\.[^.]+\.adaLN_modulation)\.0\.", r"\1.1."),
    (r"^tmlp\.linear_in\.", "tmlp.0."), (r"^tmlp\.linear_out\.", "tmlp.2."),  # Krea 2
    (r"^tproj\.linear\.", "tproj.1."), (r"^txtmlp\.norm\.", "txtmlp.0."),
    (r"^txtmlp\.linear_in\.", "txtmlp.1."), (r"^txtmlp\.linear_out\.", "txtmlp.3."),
    (r"^t5_blocks\.(\d+)\.attention\.layer_norm\.", r"encoder.block.\1.layer.0.layer_norm."),  # T5
    (r"^t5_blocks\.(\d+)\.attention\.", r"encoder.block.\1.layer.0."),
    (r"^t5_blocks\.(\d+)\.ff\.", r"encoder.block.\1.layer.1."),
    (r"^final_layer_norm\.", "encoder.final_layer_norm."),
    (r"^(?:encoder\.)?(embed_tokens\.|norm\.weight$|layers\.\d+\.(?:self_attn|mlp|\w+_layernorm)\.)",
     r"model.\1"),  # Qwen3, Qwen2.5-VL
    (r"^encoder\.visual\.", "visual."), (r"^visual\.merger\.mlp_0\.", "visual.merger.mlp.0."),
    (r"^visual\.merger\.mlp_1\.", "visual.merger.mlp.2."),
)
_OF_LIBRARIES = ((r"^vision_tower\.(?!vision_model)", "visual."),)
PATCHES = re.compile(r"patch_embed(\.proj|ding)\.weight$")  # kernels, channels last


def is_of_mflux(metadata: Mapping[str, Any]) -> bool:
    """Returns whether the metadata of a file, or of an index, is mflux's."""
    return any(key in metadata for key in MFLUX)


def common_name(name: str, metadata: Mapping[str, Any]) -> str:
    """Returns the name that diffusers or transformers give a tensor.

    Args:
        name: in the file.
        metadata: of the file.
    """
    for pattern, replacement in _rules(metadata):
        name = re.sub(pattern, replacement, name)
    return name


def _rules(metadata: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Returns the rules for the names of a file, none for one that MLX has not saved."""
    if is_of_mflux(metadata):
        return _OF_MFLUX
    return _OF_LIBRARIES if metadata.get("format") == "mlx" else ()


def with_common_names(file_name: str, entries: dict[str, TensorEntry],
                      metadata: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Returns the entries of a file by `common_name`, in their order.

    Raises:
        WeightFileError: two tensors would have the same name.
    """
    if not _rules(metadata):
        return entries
    renamed: dict[str, TensorEntry] = {}
    for entry in entries.values():
        name = common_name(entry.name, metadata)
        if name in renamed:
            raise WeightFileError(
                f"{file_name}: {safe_repr(entry.name)} and another tensor both mean"
                f" {safe_repr(name)}. {DOWNLOAD_AGAIN}")
        renamed[name] = replace(entry, name=name)
    return renamed


def channels_first(tensors: dict[str, torch.Tensor], metadata: Mapping[str, Any]):
    """Brings kernels of patches, of pictures or videos, into torch's order, in place.

    Args:
        tensors: name -> tensor of a file.
        metadata: of the file.
    """
    for name, tensor in tensors.items() if _rules(metadata) else ():
        if PATCHES.search(name) and tensor.ndim in (4, 5) and tensor.shape[-1] == RGB:
            tensors[name] = tensor.movedim(-1, 1)
