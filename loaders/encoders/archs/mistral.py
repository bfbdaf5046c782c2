"""Mistral Small 3 24B, whole or cut after 30 layers for Flux 2, and Ministral 3 3B.

llama.cpp calls them `llama` or, in newer versions, `mistral3`; the weights are the same.
"""
from ..arch import TEKKEN
from ..tokenizer import tekken_model
from .llama import Llama


class Mistral(Llama):
    """Mistral Small 3 24B and Ministral 3 3B."""

    follows = "llama.cpp 0.5.0, conversion/mistral.py and mistral3.py"
    widths = (5120, 3072)

    @classmethod
    def tokenizer(cls, weights, metadata):
        return {TEKKEN: tekken_model(metadata)}
