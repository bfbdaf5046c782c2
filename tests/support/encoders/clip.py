"""CLIP under transformers' names, and under open_clip's. Those of stable-diffusion.cpp:
tests/loaders/encoders/test_clip.py."""
import torch

from .encoder import Encoder

CLIP_SMALL = {
    "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 8,
}
LAYER = "text_model.encoder.layers.{}.mlp.fc1.weight"

ENCODERS = {
    "clip-l": Encoder("CLIP_L", "stable_diffusion", None, CLIP_SMALL, "clip_l",
                      {LAYER.format(0): (128, 64)}),
    "clip-h": Encoder("CLIP_H", "stable_diffusion", None, CLIP_SMALL, "clip_h",
                      {LAYER.format(22): (32, 32)}),
    "clip-g": Encoder("CLIP_G", "stable_diffusion", None, CLIP_SMALL, "clip_g",
                      {LAYER.format(30): (32, 32)})
}

OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.", "self_attn.in_proj.weight": "attn.in_proj_weight",
    "self_attn.in_proj.bias": "attn.in_proj_bias", "self_attn.out_proj.": "attn.out_proj."
}


def fused(weights):
    """Query, key and value one below the other, the projection transposed: as open_clip keeps
    them."""
    out = {}
    for name, tensor in weights.items():
        if name == "text_projection.weight":
            out[name] = tensor.t().contiguous()
        elif "q_proj" in name:
            parts = [
                weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            out[name.replace("q_proj", "in_proj")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            out[name] = tensor
    return out


def of_open_clip(weights):
    def renamed(name):
        for ours, theirs in OPEN_CLIP_LAYER.items():
            name = name.replace(ours, theirs)
        return OPEN_CLIP.get(name,
                             name.replace("text_model.encoder.layers.", "transformer.resblocks."))
    return {renamed(name): tensor for name, tensor in fused(weights).items()}
