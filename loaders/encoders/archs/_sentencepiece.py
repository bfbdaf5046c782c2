"""The tokenizer of encoders whose SentencePiece model the host reads from their file."""
from collections.abc import Mapping
from typing import Any

import torch

from ..arch import SENTENCEPIECE, Weights
from ..tokenizer import sentencepiece_model


def sentencepiece(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Weights:
    """Returns the SentencePiece model among the weights, or one made from llama.cpp's metadata.

    A converter to GGUF may have stored the bytes of that tensor as another dtype.

    Raises:
        KeyError: with the key that the metadata lack.
    """
    stored = weights.get(SENTENCEPIECE)
    model = sentencepiece_model(metadata) if stored is None else stored.to(torch.uint8)
    return {SENTENCEPIECE: model}
