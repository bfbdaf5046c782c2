"""Tokenizers from the metadata of GGUF files (`tokenizer.ggml.*`), in the forms the host reads."""
from collections.abc import Mapping
from typing import Any

import torch


def sentencepiece_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """The bytes of a SentencePiece model, uint8. Raises KeyError with the key that the metadata lack."""
    raise NotImplementedError


def tekken_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """The bytes of Mistral's tekken.json, uint8. Raises KeyError with the key that the metadata lack."""
    raise NotImplementedError


def tokenizer_json(metadata: Mapping[str, Any]) -> torch.Tensor:
    """The bytes of a tokenizer.json, uint8. Raises KeyError with the key that the metadata lack."""
    raise NotImplementedError
