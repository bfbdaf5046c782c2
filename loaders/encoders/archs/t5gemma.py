"""T5-Gemma, of which llama.cpp has no export: files with the names of transformers."""
from ..arch import Arch
from ._sentencepiece import sentencepiece

MARK = "encoder.layers.0.pre_self_attn_layernorm.weight"


class T5Gemma(Arch):
    """A whole model (`model.encoder.…`), of which the encoder is kept, or an encoder alone
    (`encoder.…`)."""

    follows = "transformers 5.23, models/t5gemma"
    names = {}

    @classmethod
    def recognises(cls, weights):
        return MARK in weights or f"model.{MARK}" in weights

    @classmethod
    def convert(cls, weights, metadata):
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        return {
            f"model.{name}": tensor for name, tensor in weights.items()
            if name.startswith("encoder.")
        }

    @classmethod
    def tokenizer(cls, weights, metadata):
        return sentencepiece(weights, metadata)
