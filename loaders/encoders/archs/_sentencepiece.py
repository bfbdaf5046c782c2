"""The tokenizer of encoders for which the host wants a SentencePiece model from their file."""
from collections.abc import Mapping
from typing import Any

import torch

from ..arch import SENTENCEPIECE, Weights
from ..tokenizer import sentencepiece_model


def sentencepiece(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Weights:
    """The model that a file holds as a tensor, as files for the host do, or else one made of
    llama.cpp's metadata.

    A converter to GGUF may have kept the bytes of that tensor as numbers of any type. Raises
    KeyError with the key that the metadata lack.
    """
    own = weights.get(SENTENCEPIECE)
    return {SENTENCEPIECE: sentencepiece_model(metadata) if own is None else own.to(torch.uint8)}
