"""The tokenizer that transformers saved beside the weights of a text encoder, for encoders whose weight files hold none."""
from pathlib import Path

import torch

from ..files.container import map_file
from ..files.diffusers_folder import file_inside
from .arch import SENTENCEPIECE, Weights

SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")


def saved_tokenizer(folder: Path) -> Weights:
    """The SentencePiece model in an encoder's folder (`…/text_encoder_2`) or in its package's `…/tokenizer_2`, if there is one.

    As the host reads it from the weights: the file's bytes as a uint8 tensor. Raises WeightFileError.
    """
    folders = folder, folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    found = next(((place, name) for place in folders for name in SENTENCEPIECE_FILES if (place / name).is_file()), None)
    if found is None:
        return {}
    return {SENTENCEPIECE: torch.frombuffer(bytearray(map_file(file_inside(*found))), dtype=torch.uint8)}
