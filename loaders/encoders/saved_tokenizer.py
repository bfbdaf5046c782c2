"""Reads the tokenizer that transformers saved next to the weights of a text encoder."""
from pathlib import Path

import torch

from ...ops.bounded_json import read_json
from ..container.weight_file import WeightFileError, map_file
from ..files.diffusers_folder import file_inside
from .arch import SENTENCEPIECE, TEKKEN, TOKENIZER_JSON, Weights
from .tokenizer import TokenizerError, metadata_of_json, tekken_model

# Key of the host's state dict -> the files that hold such a tokenizer, the best first.
TOKENIZER_FILES = {
    SENTENCEPIECE: ("spiece.model", "tokenizer.model"),
    TEKKEN: ("tekken.json", "tokenizer.json"),
    TOKENIZER_JSON: ("tokenizer.json",),
}


def saved_tokenizer(folder: Path, key: str = SENTENCEPIECE) -> Weights:
    """Reads the tokenizer in an encoder's folder (`…/text_encoder_2`) or in `…/tokenizer_2`.

    Args:
        folder: of the encoder.
        key: of TOKENIZER_FILES. TEKKEN is made from a tokenizer.json where there is only that.

    Returns:
        `key` -> the file's bytes as a uint8 tensor; empty where there is no such file.

    Raises:
        WeightFileError: for a file that cannot be read or converted.
    """
    paths = [
        parent / name for name in TOKENIZER_FILES[key] for parent in (folder, sibling_of(folder))
    ]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    data = bytearray(map_file(file_inside(path.parent, path.name)))
    if key == TEKKEN and path.name == "tokenizer.json":
        try:
            return {TEKKEN: tekken_model(metadata_of_json(read_json(bytes(data))))}
        except (ValueError, KeyError) as error:
            problem = error if isinstance(error, TokenizerError) else "it is damaged"
            raise WeightFileError(
                f"{path.parent.name}: its tokenizer.json cannot be converted to Mistral's"
                f" tekken.json: {problem}. Put the tekken.json that was published with the model"
                " next to its weights.") from error
    return {key: torch.frombuffer(data, dtype=torch.uint8)}


def sibling_of(folder: Path) -> Path:
    """Returns the folder where a pipeline has the tokenizer of the encoder in a folder."""
    return folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
