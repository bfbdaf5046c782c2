"""The text part of Jina CLIP v2, of which llama.cpp has no export: files with the host's names."""
from ..arch import Arch
from ._sentencepiece import sentencepiece


class JinaClip2(Arch):
    follows = "ComfyUI 0.30, comfy/text_encoders/jina_clip_2.py"
    names = {}

    @classmethod
    def recognises(cls, weights):
        return "model.encoder.layers.0.mixer.Wqkv.weight" in weights

    @classmethod
    def tokenizer(cls, weights, metadata):
        return sentencepiece(weights, metadata)
