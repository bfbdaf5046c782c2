"""Finds the two embedded texts that SeedVR2 runs with, for files of the model that lack them.

ComfyUI keeps them in the model's file. Files made for other nodes lack them, since these nodes read
them from two files of their own.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..container.weight_file import WeightFileError
from ..files.open_weights import open_weights
from ..files.torch_file import is_plain, read_torch_object
from ..paths.folders import find_companion

# ComfyUI's name in the model's file -> name of the text's own file, without its suffix
FILES = {"positive_conditioning": "pos_emb", "negative_conditioning": "neg_emb"}
SUFFIXES = (".safetensors", ".pt")
WIDTH = 5120


def add_texts(state_dict: dict[str, torch.Tensor], prefix: str, path: str | Path,
              config: Mapping[str, Any] | None):
    """Adds the texts that a SeedVR2 lacks, from files next to it or in the model folders.

    Args:
        state_dict: of a diffusion model with the host's names; it is changed.
        prefix: of the names of the model.
        path: of the model's file.
        config: the host's `unet_config` of the model, None if it detects none.

    Raises:
        WeightFileError: if such a file cannot be read or holds something else.
    """
    if config is None or config.get("image_model") != "seedvr2":
        return
    for name, file in FILES.items():
        if f"{prefix}{name}" in state_dict:
            continue
        found = find_companion(str(path), [file + suffix for suffix in SUFFIXES])
        if found is not None:
            state_dict[f"{prefix}{name}"] = read_text(found)


def read_text(path: str) -> torch.Tensor:
    """Returns the text (tokens, WIDTH) in a file with this tensor alone, a copy.

    Raises:
        WeightFileError: if the file cannot be read or holds something else.
    """
    if path.endswith(".pt"):
        content = read_torch_object(path, "a text of SeedVR2")
    else:
        content = open_weights(path).state_dict()
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)) and len(content) == 1:
        content = content[0]
    if not (isinstance(content, torch.Tensor) and is_plain(content)
            and content.is_floating_point() and content.ndim > 1
            and content.numel() == content.shape[-2] * WIDTH == content.shape[-2:].numel() > 0):
        raise WeightFileError(
            f"{Path(path).name} does not hold a text of SeedVR2, expected one tensor of tokens by"
            f" {WIDTH}. Replace it by the file that was published with SeedVR2.")
    return content.reshape(-1, WIDTH).clone()
