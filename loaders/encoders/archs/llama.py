"""Llama 3 8B, also inside LLaVA-Llama-3: the text encoder of HunyuanVideo and HiDream."""
from typing import ClassVar

from ..arch import Arch
from ._decoder import is_plain_decoder, with_rotary_halves


class Llama(Arch):
    """Llama 3 8B."""

    follows = "llama.cpp 0.5.0, conversion/llama.py"
    widths: ClassVar[tuple[int, ...]] = (4096,)

    @classmethod
    def recognises(cls, weights):
        return is_plain_decoder(weights, cls.widths)

    @classmethod
    def convert(cls, weights, metadata):
        return with_rotary_halves(weights)
