"""Qwen's vision towers: converts the tensors of llama.cpp's mmproj files to the host's.

Names and layouts follow llama.cpp 0.5.0, conversion/qwenvl.py and conversion/qwen3vl.py.
"""
from collections.abc import Mapping

import torch

from ....ops.tensor.row_slicing import dense, join_rows
from ..arch import Weights, rename_keys, unswap_ffn

BLOCK = "visual.blocks.{}"

# What all towers share.
VISION_NAMES = {
    "v.patch_embd": "visual.patch_embed.proj",
    "v.blk.{}.ln1": f"{BLOCK}.norm1",
    "v.blk.{}.ln2": f"{BLOCK}.norm2",
    "v.blk.{}.attn_qkv": f"{BLOCK}.attn.qkv",
    "v.blk.{}.attn_out": f"{BLOCK}.attn.proj",
}
QWEN25_VISION_NAMES = {
    **VISION_NAMES,
    "v.blk.{}.ffn_gate": f"{BLOCK}.mlp.gate_proj",
    "v.blk.{}.ffn_up": f"{BLOCK}.mlp.up_proj",
    "v.blk.{}.ffn_down": f"{BLOCK}.mlp.down_proj",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
QWEN3_VISION_NAMES = {  # Qwen3-VL and Qwen3.5
    **VISION_NAMES,
    "v.position_embd": "visual.pos_embed",
    "v.blk.{}.ffn_up": f"{BLOCK}.mlp.linear_fc1",
    "v.blk.{}.ffn_down": f"{BLOCK}.mlp.linear_fc2",
    "v.post_ln": "visual.merger.norm",
    "mm.0": "visual.merger.linear_fc1",
    "mm.2": "visual.merger.linear_fc2",
    "v.deepstack.{}.norm": "visual.deepstack_merger_list.{}.norm",
    "v.deepstack.{}.fc1": "visual.deepstack_merger_list.{}.linear_fc1",
    "v.deepstack.{}.fc2": "visual.deepstack_merger_list.{}.linear_fc2",
}


# Tensors that are read from every tower.
REQUIRED = {
    "v.patch_embd.weight", "v.patch_embd.weight.1", "v.blk.0.ln1.weight", "v.blk.0.ffn_down.weight",
    "mm.2.weight"
}


def is_qwen25_tower(vision: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether these are the weights of a Qwen2.5-VL's tower."""
    return (
        _is_complete(vision)
        and "v.blk.0.ffn_gate.weight" in vision
        and "v.position_embd.weight" not in vision
    )


def is_qwen3_tower(vision: Mapping[str, torch.Tensor], deepstack: bool) -> bool:
    """Returns whether these are the weights of a Qwen3-VL's tower or a Qwen3.5's.

    Args:
        vision: of the mmproj file.
        deepstack: True for Qwen3-VL, which also gives the text model features of inner layers.
    """
    has_deepstack = any(name.startswith("v.deepstack.") for name in vision)
    return (
        _is_complete(vision)
        and "v.position_embd.weight" in vision
        and has_deepstack == deepstack
    )


def _is_complete(vision: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether everything that `convert_tower` and `output_width` read is in the file."""
    parts = {
        name.replace(".attn_q.", f".attn_{part}.") for name in _queries(vision) for part in "kv"
    }
    return REQUIRED | parts <= vision.keys()


def _queries(vision: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of the query projections that are stored apart from keys and values."""
    return [name for name in vision if name.startswith("v.blk.") and ".attn_q." in name]


def output_width(vision: Mapping[str, torch.Tensor]) -> int:
    """Returns the width of what a tower gives to the text model."""
    return vision["mm.2.weight"].shape[0]


def split_vision(weights: Mapping[str, torch.Tensor]) -> tuple[Weights, Weights]:
    """Returns the weights of the text model and those of the tower, under the file's names."""
    vision = {name: tensor for name, tensor in weights.items() if name.startswith(("v.", "mm."))}
    return {name: tensor for name, tensor in weights.items() if name not in vision}, vision


def convert_tower(vision: Weights, names: Mapping[str, str | None]) -> Weights:
    """Converts the weights of a tower to the host's names, which begin with `visual.`.

    Args:
        vision: of the mmproj file.
        names: a table like `Arch.names`.
    """
    vision = dict(vision)
    if "v.patch_embd.weight.1" in vision:
        # The file splits the convolution over two frames into one per frame.
        frames = [
            dense(vision.pop(name)) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")
        ]
        vision["v.patch_embd.weight"] = torch.stack(frames, 2)
    for name in _queries(vision):
        parts = [vision.pop(name.replace(".attn_q.", f".attn_{part}.")) for part in "qkv"]
        vision[name.replace(".attn_q.", ".attn_qkv.")] = join_rows(parts)
    return rename_keys(_renumber_deepstack(unswap_ffn(vision)), names)


def _renumber_deepstack(vision: Weights) -> Weights:
    """Numbers the mergers from 0; the file numbers them by the layer that they read."""
    prefix = "v.deepstack."
    layers = sorted({int(name.split(".")[2]) for name in vision if name.startswith(prefix)})
    numbers = {str(layer): str(index) for index, layer in enumerate(layers)}
    renamed = {}
    for name, tensor in vision.items():
        if name.startswith(prefix):
            layer, dot, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{numbers.get(layer, layer)}{dot}{rest}"
        renamed[name] = tensor
    return renamed
