"""CLIP under transformers' names. Those of stable-diffusion.cpp and open_clip:
tests/loaders/encoders/test_clip.py."""
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
