"""The tokenizer that transformers saved beside the weights of a text encoder, for encoders whose
weight files hold none."""
from pathlib import Path

import torch

from ...ops.bounded_json import read_json
from ..files.container import WeightFileError, map_file
from ..files.diffusers_folder import file_inside
from .arch import SENTENCEPIECE, TEKKEN, TOKENIZER_JSON, Weights
from .tokenizer import TokenizerError, metadata_of_json, tekken_model

# What the host builds a tokenizer from -> the files that hold it.
TOKENIZER_FILES = {
    SENTENCEPIECE: ("spiece.model", "tokenizer.model"), TEKKEN: ("tekken.json", "tokenizer.json"),
    TOKENIZER_JSON: ("tokenizer.json",)}


def saved_tokenizer(folder: Path, wanted: str = SENTENCEPIECE) -> Weights:
    """The tokenizer in an encoder's folder (`…/text_encoder_2`) or in its package's
    `…/tokenizer_2`, if there is one.

    wanted: a key of TOKENIZER_FILES. As the host reads it from the weights: the file's bytes as a
    uint8 tensor. A tekken.json is made of a tokenizer.json where there is only that. Raises
    WeightFileError.
    """
    folders = folder, folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    found = next(((place, name) for name in TOKENIZER_FILES[wanted]
                  for place in folders if (place / name).is_file()), None)
    if found is None:
        return {}
    data = bytearray(map_file(file_inside(*found)))
    if wanted == TEKKEN and found[1] == "tokenizer.json":
        try:
            return {TEKKEN: tekken_model(metadata_of_json(read_json(bytes(data))))}
        except (ValueError, KeyError) as error:
            problem = error if isinstance(error, TokenizerError) else "it is damaged"
            raise WeightFileError(
                f"{found[0].name}: of its tokenizer.json no tokenizer of Mistral can be made:"
                f" {problem}. Put the tekken.json that was published with the model beside its"
                " weights.") from error
    return {wanted: torch.frombuffer(data, dtype=torch.uint8)}
