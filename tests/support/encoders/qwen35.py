"""Qwen3.5."""
import gguf
import torch
from comfy.text_encoders import qwen35

from .encoder import Encoder, Weights
from .qwen_vl import qwen3_mmproj

TOWER = {"hidden_size": 128, "num_heads": 2, "intermediate_size": 256, "depth": 2,
             "num_position_embeddings": 64}
HEAD = 128  # width of a head of linear attention
KEY_HEADS = 2
SMALL = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention",
                    "full_attention"], "vocab_size": 256, "intermediate_size": 256,
    "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": KEY_HEADS
}


def published(weights: Weights) -> Weights:
    out = {}
    for name, tensor in weights.items():
        name = name.replace("model.", "model.language_model.",
                            1).replace("model.language_model.lm_head", "lm_head")
        out[name.replace("visual.", "model.visual.", 1)] = tensor
    return out


def tiled(tensor: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """Heads of values that are grouped by key head, as llama.cpp wants them: the first of each
    group, then the second ..."""
    shape = tensor.shape
    return tensor.unflatten(dim, (KEY_HEADS, -1, width)).transpose(dim, dim + 1).reshape(shape)


def converted(weights: Weights) -> Weights:
    """What llama.cpp 0.5.0 changes (conversion/qwen.py, Qwen3NextModel and
    _LinearAttentionVReorderBase)."""
    out = {}
    keys = 2 * KEY_HEADS * HEAD
    for name, tensor in weights.items():
        name = name.replace("language_model.", "")
        if "linear_attn." in name:
            if "conv1d" in name:
                tensor = tensor.squeeze()
            if "in_proj_qkv" in name or "conv1d" in name:
                tensor = torch.cat([tensor[:keys], tiled(tensor[keys:], 0, HEAD)])
            elif "in_proj_z" in name:
                tensor = tiled(tensor, 0, HEAD)
            elif "out_proj" in name:
                tensor = tiled(tensor, 1, HEAD)
            elif "linear_attn.norm" not in name:
                tensor = tiled(tensor, 0, 1)
            if name.endswith("A_log"):
                tensor = -tensor.exp()
            name = name.replace("dt_bias", "dt_proj.bias")
        elif name.endswith("norm.weight"):
            tensor = tensor + 1
        out[name] = tensor
    return out


def encoder(size: str, width: int, value_heads: int) -> Encoder:
    name, layer = f"qwen35_{size}", "model.language_model.layers.0"
    config = {**SMALL, "hidden_size": width, "linear_num_value_heads": value_heads}
    markers = {
        f"{layer}.linear_attn.A_log": (value_heads,), f"{layer}.input_layernorm.weight": (width,)
    }
    towers = [(qwen35.QWEN35_MODELS, {name: {**qwen35.QWEN35_MODELS[name], "vision": TOWER}})]
    return Encoder(name.upper(), "stable_diffusion", gguf.MODEL_ARCH.QWEN35, config, name, markers,
                   converted, published=published, towers=towers, mmproj=qwen3_mmproj)


ENCODERS = {
    "qwen3.5-0.8b": encoder("08b", 1024, KEY_HEADS),
    "qwen3.5-2b": encoder("2b", 2048, KEY_HEADS),
    "qwen3.5-4b": encoder("4b", 2560, 2 * KEY_HEADS),
    "qwen3.5-9b": encoder("9b", 4096, 2 * KEY_HEADS),
    "qwen3.5-27b": encoder("27b", 5120, 3 * KEY_HEADS),
}
