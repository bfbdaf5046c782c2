"""T5-Gemma: files with the names of transformers, since llama.cpp exports none."""
from ..arch import Arch
from ..tokenizer import sentencepiece

FIRST_NORM = "encoder.layers.0.pre_self_attn_layernorm.weight"


class T5Gemma(Arch):
    """The encoder of T5-Gemma, alone (`encoder.…`) or in a whole model (`model.encoder.…`)."""

    follows = "transformers 5.23, models/t5gemma"
    names = {}

    @classmethod
    def recognises(cls, weights):
        return FIRST_NORM in weights or f"model.{FIRST_NORM}" in weights

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
