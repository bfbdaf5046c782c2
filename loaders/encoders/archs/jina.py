"""The text part of Jina CLIP v2: files with the host's names, since llama.cpp exports none."""
from ..arch import Arch
from ..tokenizer import sentencepiece


class JinaClip2(Arch):
    """Jina CLIP v2, which needs a family for its tokenizer alone."""

    follows = "ComfyUI 0.30, comfy/text_encoders/jina_clip_2.py"
    names = {}

    @classmethod
    def recognises(cls, weights):
        return "model.encoder.layers.0.mixer.Wqkv.weight" in weights

    @classmethod
    def tokenizer(cls, weights, metadata):
        return sentencepiece(weights, metadata)
