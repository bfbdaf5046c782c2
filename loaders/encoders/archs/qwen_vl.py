"""The vision towers of Qwen: mmproj files of llama.cpp, whose tensors lie among those of the text
model.

Names and changes follow llama.cpp 0.5.0, conversion/qwenvl.py and conversion/qwen3vl.py.
"""
from collections.abc import Mapping

import torch

from ....ops.row_slicing import dense, join_rows
from ..arch import Weights, rename_keys

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


# What is read of every tower.
READ = {
    "v.patch_embd.weight", "v.patch_embd.weight.1", "v.blk.0.ln1.weight", "v.blk.0.ffn_down.weight",
    "mm.2.weight"
}


def is_qwen25_tower(vision: Mapping[str, torch.Tensor]) -> bool:
    return (
        _is_whole(vision)
        and "v.blk.0.ffn_gate.weight" in vision
        and "v.position_embd.weight" not in vision
    )


def is_qwen3_tower(vision: Mapping[str, torch.Tensor], deepstack: bool) -> bool:
    """Whether these are the weights of a Qwen3-VL's tower or a Qwen3.5's.

    deepstack: of the one that also hands features of inner layers to the text model (Qwen3-VL).
    """
    has_deepstack = any(name.startswith("v.deepstack.") for name in vision)
    return _is_whole(vision) and "v.position_embd.weight" in vision and has_deepstack == deepstack


def _is_whole(vision: Mapping[str, torch.Tensor]) -> bool:
    """Whether all is there that `tower` and `width_given` read."""
    queries = [name for name in vision if name.startswith("v.blk.") and ".attn_q." in name]
    parts = {name.replace(".attn_q.", f".attn_{part}.") for name in queries for part in "kv"}
    return READ | parts <= vision.keys()


def width_given(vision: Mapping[str, torch.Tensor]) -> int:
    """The width of what a tower gives to the text model."""
    return vision["mm.2.weight"].shape[0]


def split_vision(weights: Mapping[str, torch.Tensor]) -> tuple[Weights, Weights]:
    """(weights of the text model, weights of the vision tower), under the file's names."""
    vision = {name: tensor for name, tensor in weights.items() if name.startswith(("v.", "mm."))}
    return {name: tensor for name, tensor in weights.items() if name not in vision}, vision


def tower(vision: Weights, names: Mapping[str, str | None]) -> Weights:
    """The weights of a tower under the host's names, `visual.` first. names: as `Arch.names`."""
    vision = dict(vision)
    if "v.patch_embd.weight.1" in vision:
        # The convolution over two frames is stored as one convolution for each.
        frames = [
            dense(vision.pop(name)) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")
        ]
        vision["v.patch_embd.weight"] = torch.stack(frames, 2)
    for name in [name for name in vision if name.startswith("v.blk.") and ".attn_q." in name]:
        parts = [vision.pop(name.replace(".attn_q.", f".attn_{part}.")) for part in "qkv"]
        vision[name.replace(".attn_q.", ".attn_qkv.")] = join_rows(parts)
    return rename_keys(_deepstack_in_order(_up_before_down(vision)), names)


def _up_before_down(vision: Weights) -> Weights:
    """Old converters called the two matrices of a block's network by each other's name; `clip.cpp`
    swaps them as well."""
    width = vision["v.blk.0.ln1.weight"].shape[0]
    if vision["v.blk.0.ffn_down.weight"].shape[1] != width:
        return vision
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return {
        ".".join(swapped.get(part, part) for part in name.split(".")): tensor
        for name, tensor in vision.items()
    }


def _deepstack_in_order(vision: Weights) -> Weights:
    """The mergers numbered from 0; the file numbers them by the layer whose output they take."""
    layers = sorted({int(name.split(".")[2]) for name in vision if name.startswith("v.deepstack.")})
    place = {f"v.deepstack.{layer}.": f"v.deepstack.{index}." for index, layer in enumerate(layers)}
    return {
        next(
            (new + name[len(old) :] for old, new in place.items() if name.startswith(old)), name
        ): tensor
        for name, tensor in vision.items()
    }
