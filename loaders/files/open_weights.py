"""Opens weight files in every supported container, and folders of them."""
import os
from pathlib import Path

from ..container.weight_file import WeightFile, WeightFileError, map_file
from ..refusals.wrong_format import sniff_wrong_format
from .diffusers_folder import ModelFolder
from .gguf import GGUFFile
from .safetensors import SafetensorsFile
from .torch_file import TorchFile


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Opens a weight file, or a folder that diffusers or transformers saved (with `config.json`).

    Raises:
        WeightFileError: the file or folder is missing, damaged or not supported.
    """
    path = Path(path)
    if path.is_dir():
        return ModelFolder(path)
    head = map_file(path)[:512]
    for container in (GGUFFile, SafetensorsFile, TorchFile):
        if container.recognises(head):
            return container(path)
    raise WeightFileError(
        f"{path.name} is not a supported weight file: {sniff_wrong_format(head)}")
