"""Chooses which files this pack reads and which go to the host's own loaders."""
import os
from collections.abc import Container
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..comfyui.comfy_quant_weights import host_reads
from ..comfyui.module_files import CHECKPOINT_PREFIX
from ..comfyui.weight_keys import is_cut
from ..files.safetensors import SafetensorsFile, is_shard
from ..files.scale_map import TORCH, scale_map
from ..quantizers.base import TensorHeader
from ..quantizers.comfy_quant_marks import MarkError, has_other_names, marked_layers
from ..quantizers.judgement import judge
from ..quantizers.registry import has_quantized_weights
from .pack_on_load import PackTo

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
# What opening a safetensors file raises. The last two: it cannot be mapped, by torch or at all.
UNREADABLE = (SafetensorError, OSError, RuntimeError, MemoryError)


def needs_own_reader(path: str, pack_to: PackTo | None = None,
                     host_formats: Container[str] = (),
                     other_formats: Container[str] | None = None) -> bool:
    """Returns whether `open_weights` reads a file; the host's own loaders read all others.

    It reads GGUF, folders, safetensors split over several files (the host would take one file for a
    whole model), and safetensors with weights that one of `quantizers.registry` packed, or with
    some of the host's own formats. It also takes damaged safetensors and quantised formats that the
    host does not read, to say what is wrong with them.

    Args:
        path: of a file or folder.
        pack_to: what weights are packed to as they are read, or None.
        host_formats: ComfyUI's own formats that this pack computes.
        other_formats: those in the text encoder and VAE of a checkpoint, None: the same.
    """
    def formats_of(layer: str) -> Container[str]:
        if other_formats is None or layer.startswith(CHECKPOINT_PREFIX):
            return host_formats
        return other_formats

    if pack_to or str(path).lower().endswith(".gguf") or os.path.isdir(path):
        return True
    if not is_safetensors(path):
        return str(path).lower().endswith(TORCH) and scale_map(path) is not None
    if is_shard(path):
        return True
    try:
        file = safe_open(path, framework="pt")
    except UNREADABLE:
        return True
    with file:
        keys, metadata = file.keys(), file.metadata() or {}
        try:
            return (any(map(is_cut, keys))
                    or has_quantized_weights(keys, metadata, partial(_header_of, file))
                    or has_other_names(metadata, keys)
                    # diffusers' q, k and v, which ComfyUI joins in some models without their scales
                    or any(layer.endswith((".to_q", ".to_k", ".to_v"))
                           for layer in marked_layers(metadata, keys))
                    or judge({name: _header_of(file, name) for name in keys}, metadata,
                             file.get_tensor, looks=False).refused is not None
                    or not host_reads(keys, file.get_tensor, metadata, formats_of))
        except (SafetensorError, MarkError):
            return True


def has_plain_fp8(path: str) -> bool:
    """Returns whether a safetensors file has weights in fp8 without a mark or a scale."""
    if not is_safetensors(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            marked = marked_layers(file.metadata() or {}, names)
            return any(
                file.get_slice(name).get_dtype() in FP8_TYPES for name in names
                if name.endswith(".weight") and name.removesuffix(".weight") not in marked)
    except UNREADABLE:
        return False


def shapes_in(path: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file that the host's own loader reads, without values; none where it
    is no safetensors."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), dtype=torch.uint8,
                                  device="meta")
                for name in file.keys()}  # noqa: SIM118


def is_safetensors(path: str) -> bool:
    """Returns whether a path is named as safetensors are."""
    return str(path).lower().endswith((".safetensors", ".sft"))


def _header_of(file: Any, name: str) -> TensorHeader:
    """Returns the header of a tensor of an open safetensors file."""
    tensor = file.get_slice(name)
    return TensorHeader(SafetensorsFile.dtypes.get(tensor.get_dtype()), tuple(tensor.get_shape()))
