"""Mistral Small 3 24B, whole or cut after 30 layers for Flux 2, and Ministral 3 3B.

llama.cpp calls them `llama` or, in newer versions, `mistral3`; the weights are the same.
"""
from ..arch import TEKKEN, Arch
from ..tokenizer import tekken_model
from ._decoder import is_plain_decoder, with_rotary_halves

SMALL_3, MINISTRAL_3 = 5120, 3072  # widths


class Mistral(Arch):
    """Mistral Small 3 24B and Ministral 3 3B."""

    follows = "llama.cpp 0.5.0, conversion/mistral.py and mistral3.py"

    @classmethod
    def recognises(cls, weights):
        return is_plain_decoder(weights, {SMALL_3, MINISTRAL_3})

    @classmethod
    def convert(cls, weights, metadata):
        return with_rotary_halves(weights)

    @classmethod
    def tokenizer(cls, weights, metadata):
        return {TEKKEN: tekken_model(metadata)}
