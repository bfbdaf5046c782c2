"""Folders as diffusers and transformers save one model: `config.json` beside safetensors files.

Weights lie in one file, or in several that `*.safetensors.index.json` lists (`weight_map`: tensor
-> file). Of a variant, such as fp16, that is `*.safetensors.index.fp16.json`.
"""
import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ...ops.bounded_json import read_json
from .container import WeightFileError, display_name, map_file, safe_repr
from .safetensors import SafetensorsFile
from .unsupported_quantizers import OTHER_FORM

# Names that diffusers and transformers give to the weights; others are taken where there is one
# only.
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INDEX = ".index.json"
VARIANT_INDEX = re.compile(r".+\.safetensors\.index\.\w+\.json")


class ModelFolder(SafetensorsFile):
    """The weights of one model's folder (`…/transformer`, `…/text_encoder_2`). config: what its
    `config.json` says.

    Raises WeightFileError.
    """

    config: Mapping[str, Any]

    def __init__(self, path: str | os.PathLike):
        folder = Path(path)
        try:
            self.config = _read_config(folder)
            files, index = _weight_files(folder)
        except OSError as error:  # of a link too, whose end has no possible name
            raise _error(
                folder,
                f"it cannot be listed ({error.strerror}); check its links, permissions and drive."
            ) from error
        super().__init__(folder, files)
        for name, file in index.items():
            entry = self.entries.get(name)
            if entry is None or self.paths[entry.part].name != file:
                raise _error(
                    folder,
                    f"its index says that {safe_repr(name)} is in {file}, where it is not."
                    f" Download all files of the folder again from one place.")

    @property
    def declared_type(self) -> str:
        """The class the model is of in diffusers or transformers, "" where the config does not
        say."""
        architectures = self.config.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
        return str(self.config.get("_class_name", architecture))


def _error(folder: Path, problem: str) -> WeightFileError:
    return WeightFileError(f"{Path(*folder.parts[-2:])}: {problem}")


def file_inside(folder: Path, name: str) -> Path:
    """A file of a folder. Raises WeightFileError where it is a link that leads out of the folder.

    A whole folder that is a link is what its user made of it, and in the cache of Hugging Face all
    files are links to `blobs`. A link inside a downloaded folder could be to any file of this
    machine.
    """
    real, place = os.path.realpath(folder / name), Path(os.path.realpath(folder))
    blobs = [parent.parent / "blobs" for parent in place.parents if parent.name == "snapshots"]
    if not any(real.startswith(os.path.join(inside, "")) for inside in (place, *blobs)):
        raise _error(
            folder,
            f"its {safe_repr(name)} is a link to {safe_repr(real)}, outside of the folder. Put the"
            " file itself there."
        )
    return folder / name


def _read_json(folder: Path, name: str) -> dict:
    path = file_inside(folder, name)
    try:
        data = bytes(map_file(path))
    except WeightFileError as error:
        raise _error(folder, f"its {error}") from error
    try:
        content = read_json(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise _error(folder, f"its {name} is not a JSON object. Download it again.")
    return content


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        models = sorted(found.parent.name for found in folder.glob("*/config.json"))
        advice = (
            f"Pick one of the folders in it: {', '.join(models)}."
            if models
            else "Pick a weight file."
        )
        raise WeightFileError(f"{folder} is a folder without the config.json of a model. {advice}")
    config = _read_json(folder, "config.json")
    quantiser = config.get("quantization_config")
    if quantiser is not None:
        known = quantiser if isinstance(quantiser, dict) else {}
        unnamed = (
            "bitsandbytes" if known.get("load_in_4bit") or known.get("load_in_8bit") else quantiser
        )
        name = known.get("quant_method", unnamed)
        if name != "bitsandbytes":
            raise _error(
                folder,
                f"its config.json says that the weights are quantised by {safe_repr(name)}; of"
                f" such folders bitsandbytes' are supported (4-bit NF4 and FP4, int8)."
                f" {OTHER_FORM}")
    return config


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of the weights, and what the index says about which tensor is in which."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = [name for name in names if name.endswith(".safetensors")]
    indices = ([name for name in names if name.endswith(".safetensors" + INDEX)]
               or [name for name in names if VARIANT_INDEX.fullmatch(name)])
    for usual in USUAL_NAMES:
        if usual in files:
            return [file_inside(folder, usual)], {}
        if usual + INDEX in indices:
            return _files_of_index(folder, usual + INDEX)
    if len(indices) == 1:
        return _files_of_index(folder, indices[0])
    if indices:
        raise _error(
            folder,
            f"it has several indices ({', '.join(indices)}). Keep the one of the weights to load.")
    if len(files) == 1 and "-of-" not in files[0]:
        return [file_inside(folder, files[0])], {}
    if files:
        others = " and others" if files[1:] else ""
        raise _error(
            folder,
            f"it has {files[0]}{others}, and no *.safetensors{INDEX} that says which belong"
            f" together. Download that file too.")
    others = [
        name for name in names
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf"))
    ]
    found = f"only {others[0]}" if others else "none"
    raise _error(
        folder,
        f"*.safetensors weights are expected in it, there are {found}. Download them into it.")


def _files_of_index(folder: Path, name: str) -> tuple[list[Path], dict[str, str]]:
    index = _read_json(folder, name).get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(
            isinstance(file, str) and file.endswith(".safetensors") and is_bare(file)
            for file in index.values()
        )
    ):
        raise _error(
            folder,
            f"its {name} has no weight_map of tensors to .safetensors files. Download it again.")
    files = sorted(set(index.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise _error(
            folder,
            f"{display_name(missing[0])} is"
            f" missing{f' and {len(missing) - 1} more are' if missing[1:] else ''}, of the"
            f" {len(files)} files its {name} lists. Download all of them into it.")
    return [file_inside(folder, file) for file in files], index


def is_bare(name: str) -> bool:
    """Whether this is the name of a file and leads to no other folder, drive or machine, on any
    system."""
    return PureWindowsPath(name).name == name
