"""Llama 3 8B, also inside LLaVA-Llama-3: the text encoder of HunyuanVideo and HiDream."""
from ..arch import Arch
from ._decoder import is_plain_decoder, with_rotary_halves

WIDTH = 4096


class Llama(Arch):
    """Llama 3 8B."""

    follows = "llama.cpp 0.5.0, conversion/llama.py"

    @classmethod
    def recognises(cls, weights):
        return is_plain_decoder(weights, {WIDTH})

    @classmethod
    def convert(cls, weights, metadata):
        return with_rotary_halves(weights)
