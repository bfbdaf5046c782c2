"""Weight files of every kind: `open_weights` reads them. Importing this package registers every
container."""
import os
from pathlib import Path

from . import gguf, safetensors  # noqa: F401  each registers its container
from .container import CONTAINERS, WeightFile, WeightFileError, map_file
from .diffusers_folder import ModelFolder
from .wrong_format import sniff_wrong_format


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Open a weight file of any registered container, or a folder of diffusers or transformers
    (with `config.json`).

    Raises WeightFileError, and nothing else, for a bad one.
    """
    path = Path(path)
    if path.is_dir():
        return ModelFolder(path)
    head = map_file(path)[:512]
    for container in CONTAINERS.values():
        if container.recognises(head):
            return container(path)
    raise WeightFileError(
        f"{path.name} is not a weight file that can be read here: {sniff_wrong_format(head)}")
