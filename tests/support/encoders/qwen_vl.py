"""Qwen2.5-VL and Qwen3-VL, and the mmproj files of their vision towers."""
import re

import gguf
from comfy.text_encoders import qwen_vl

from .encoder import Encoder, Weights
from .qwen import KEYS, SMALL, with_head

try:
    from comfy.text_encoders import qwen3vl
except ImportError:  # ComfyUI 0.24 has none
    qwen3vl = None

QWEN25_TOWER = qwen_vl.Qwen2VLVisionTransformer
QWEN3_TOWER = {"hidden_size": 128, "intermediate_size": 256, "depth": 3,
               "deepstack_visual_indexes": [0, 2]}
LAST_LAYER = "model.layers.49.self_attn.q_proj.weight"
MERGED = 4 * 128  # a merger takes four patches of the tower's width


def small_qwen25_tower(hidden_size, **options):
    return QWEN25_TOWER(hidden_size=128, intermediate_size=100, num_heads=2, num_layers=2,
                        **options)


def for_text(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if "visual." not in name}


def in_model(weights: Weights) -> Weights:
    return {
        name.replace("visual.", "model.visual.", 1): tensor
        for name, tensor in with_head(weights).items()
    }


def qwen25_mmproj(tower: Weights) -> Weights:
    """The tensors that llama.cpp 0.5.0 writes for a tower of Qwen2.5-VL (conversion/qwenvl.py),
    host's names -> file's."""
    stored = {}
    for name, tensor in tower.items():
        if ".qkv." in name:
            for part, values in zip("qkv", tensor.chunk(3)):
                stored[name.replace("qkv", part)] = values
        else:
            stored[name] = tensor
    return _named(stored)


def qwen3_mmproj(tower: Weights, layers=QWEN3_TOWER["deepstack_visual_indexes"]) -> Weights:
    """The tensors that llama.cpp 0.5.0 writes for a tower of Qwen3-VL or Qwen3.5
    (conversion/qwen3vl.py).

    layers: those whose output the mergers of deepstack take.
    """
    merger = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
    deepstack = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
    out, rest = {}, {}
    for name, tensor in tower.items():
        if match := re.fullmatch(r"visual\.merger\.(\w+)\.(\w+)", name):
            out[f"{merger[match[1]]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"visual\.deepstack_merger_list\.(\d+)\.(\w+)\.(\w+)", name):
            out[f"v.deepstack.{layers[int(match[1])]}.{deepstack[match[2]]}.{match[3]}"] = tensor
        else:
            rest[name] = tensor
    return out | _named(rest)


def _named(tower: Weights) -> Weights:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    out = {}
    for name, tensor in tower.items():
        if tensor.ndim == 5:  # a convolution over two frames becomes one for each
            out["v.patch_embd.weight"], out["v.patch_embd.weight.1"] = tensor.unbind(2)
        else:
            out[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    return out


def qwen3_vl(size: str, clip_type: str, width: int, prefix: str, published, markers=()) -> Encoder:
    """prefix: of the names of the tower in published files. markers: beside those of the tower."""
    name = f"qwen3vl_{size.lower()}"
    markers = {f"{prefix}.deepstack_merger_list.0.norm.weight": (MERGED,),
               f"{prefix}.merger.linear_fc2.weight": (width, MERGED), **dict(markers)}
    towers = (
        [
            (qwen3vl.QWEN3VL_VISION, {name: QWEN3_TOWER}),
            (qwen3vl.QWEN3VL_VISION_COMMON, {"num_heads": 2, "num_position_embeddings": 64}),
        ]
        if qwen3vl
        else []
    )
    config = {**SMALL, "hidden_size": width}
    return Encoder(f"QWEN3VL_{size}", clip_type, gguf.MODEL_ARCH.QWEN3VL, config, name, markers,
                   for_text, published=published, towers=towers, mmproj=qwen3_mmproj)


ENCODERS = {
    "qwen2.5-vl-7b": Encoder(
        "QWEN25_7B",
        "qwen_image",
        gguf.MODEL_ARCH.QWEN2VL,
        {**SMALL, "hidden_size": 3584, "num_attention_heads": 4, "num_key_value_heads": 4},
        "qwen25_7b",
        {KEYS: (512,)},
        towers=[(vars(qwen_vl), {"Qwen2VLVisionTransformer": small_qwen25_tower})],
        mmproj=qwen25_mmproj,
    ),
    "qwen3-vl-4b": qwen3_vl("4B", "krea2", 2560, "model.visual", in_model),
    "qwen3-vl-8b": qwen3_vl("8B", "boogu", 4096, "model.visual", in_model),
    "qwen3-vl-32b": qwen3_vl("32B", "minimax", 5120, "visual", with_head, {LAST_LAYER: (32, 32)}),
}
