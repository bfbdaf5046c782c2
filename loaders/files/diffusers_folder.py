"""Folders in which diffusers or transformers saved one model: `config.json` and safetensors files.

The weights are in one file, or in several listed in `*.safetensors.index.json` (`weight_map`:
tensor -> file), for a variant such as fp16 in `*.safetensors.index.fp16.json`.
"""
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ...ops.bounded_json import read_json
from ..container.weight_file import CONFIG_KEY, WeightFileError, display_name, map_file, safe_repr
from ..name_lists import join_some
from ..quantizers.registry import METHODS
from ..refusals.unsupported_quantizers import GET_OTHER_FORMAT
from .mlx_names import common_name, is_of_mflux
from .safetensors import SafetensorsFile

# The folders of the models in a pipeline's folder.
MODEL_FOLDERS = ("transformer", "unet")
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
VAE_FOLDER = "vae"
# The names that diffusers and transformers use; a file of another name must be the only one.
DEFAULT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
MLX, MLX_KEY = "mlx", "quantization"  # the latter has what `CONFIG_KEY` has in folders of MLX
SDNQ_CONFIG = "quantization_config.json"  # which SDNQ may write beside config.json
# Nunchaku's first folders have the model in two files, without an index.
NUNCHAKU_NAMES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
INDEX = ".index.json"
MFLUX_INDEX = f"model.safetensors{INDEX}"
VARIANT_INDEX = re.compile(r".+\.safetensors\.index\.\w+\.json")


class ModelFolder(SafetensorsFile):
    """The weights of one model's folder (`…/transformer`, `…/text_encoder_2`).

    Attributes:
        config: content of its `config.json`.

    Raises:
        WeightFileError: the folder is incomplete or damaged.
    """

    config: Mapping[str, Any]

    def __init__(self, path: str | os.PathLike):
        folder = Path(path)
        try:
            self.config = _read_config(folder)
            files, index = _weight_files(folder)
        except OSError as error:  # also from a link to an impossible name
            raise _error(
                folder,
                f"it cannot be listed ({error.strerror}). Check its links, permissions and drive."
            ) from error
        super().__init__(folder, files)
        for name, file in index.items():
            entry = self.entries.get(common_name(name, self.metadata))
            if entry is None or self.paths[entry.part].name != file:
                raise _error(
                    folder,
                    f"its index lists {safe_repr(name)} in {file}, which does not contain it."
                    " Download all files of the folder again from one place.")

    @property
    def declared_type(self) -> str:
        """The model's class in diffusers or transformers, "" if the config does not name it."""
        architectures = self.config.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
        return str(self.config.get("_class_name", architecture))

    @functools.cached_property
    def quantization(self) -> Mapping[str, Any]:
        settings = self.config.get(CONFIG_KEY) or self.config.get(MLX_KEY)
        return settings if isinstance(settings, dict) else {}


def _error(folder: Path, problem: str) -> WeightFileError:
    return WeightFileError(f"{Path(*folder.parts[-2:])}: {problem}")


def file_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder, refusing links that lead out of it.

    A link inside a downloaded folder could point to any file of this machine. The folder itself may
    be a link, and files may link to `blobs` of the Hugging Face cache.

    Raises:
        WeightFileError: the file is a link to somewhere else.
    """
    real_path = os.path.realpath(folder / name)
    real_folder = Path(os.path.realpath(folder))
    blobs = [
        parent.parent / "blobs" for parent in real_folder.parents if parent.name == "snapshots"
    ]
    if not any(real_path.startswith(os.path.join(root, "")) for root in (real_folder, *blobs)):
        raise _error(
            folder,
            f"its {safe_repr(name)} is a link to {safe_repr(real_path)}, outside of the folder."
            " Put the file itself there."
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
        if is_folder_of_mflux(folder):
            return {CONFIG_KEY: {"quant_method": MLX}}
        models = sorted(config.parent.name for config in folder.glob("*/config.json"))
        advice = (
            f"Pick one of the folders in it: {', '.join(models)}."
            if models
            else "Pick a weight file."
        )
        raise WeightFileError(f"{folder} is a folder without the config.json of a model. {advice}")
    config = _read_json(folder, "config.json")
    if config.get(CONFIG_KEY) is None and (folder / SDNQ_CONFIG).is_file():
        config[CONFIG_KEY] = _read_json(folder, SDNQ_CONFIG)
    quantization = config.get(CONFIG_KEY)
    if quantization is not None:
        method = _quant_method(quantization)
        if not isinstance(method, str) or method not in METHODS:
            *names, last = dict.fromkeys(METHODS.values())
            raise _error(
                folder,
                f"its config.json says that the weights are quantized by {safe_repr(method)};"
                f" only folders quantized by {', '.join(names)} or {last} are supported."
                f" {GET_OTHER_FORMAT}")
    return config


def _quant_method(quantization: Any) -> Any:
    """Returns the quantiser that a `quantization_config` names, which MLX and older bitsandbytes
    leave out."""
    if not isinstance(quantization, dict):
        return quantization
    for key in ("quant_method", "method"):  # Nunchaku's own files have the latter
        if key in quantization:
            return quantization[key]
    if "group_size" in quantization and "bits" in quantization:
        return MLX
    is_bitsandbytes = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return "bitsandbytes" if is_bitsandbytes else quantization


def is_folder_of_mflux(folder: Path) -> bool:
    """Returns whether a folder has an index of mflux's, which saves no `config.json`."""
    if not (folder / MFLUX_INDEX).is_file():
        return False
    metadata = _read_json(folder, MFLUX_INDEX).get("metadata")
    return isinstance(metadata, dict) and is_of_mflux(metadata)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Returns the weight files, and from the index tensor -> file name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = [name for name in names if name.endswith(".safetensors")]
    indices = ([name for name in names if name.endswith(".safetensors" + INDEX)]
               or [name for name in names if VARIANT_INDEX.fullmatch(name)])
    for name in DEFAULT_NAMES:
        if name in files:
            return [file_inside(folder, name)], {}
        if name + INDEX in indices:
            return _indexed_files(folder, name + INDEX)
    if set(NUNCHAKU_NAMES) & set(files):
        return _nunchaku_files(folder, files), {}
    if len(indices) == 1:
        return _indexed_files(folder, indices[0])
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
            f"it has {files[0]}{others}, but no *.safetensors{INDEX} that lists which belong"
            " together. Download that file too.")
    other_files = [
        name for name in names
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf"))
    ]
    present = f", only {other_files[0]}" if other_files else ""
    raise _error(folder, f"it has no *.safetensors weights{present}. Download them into it.")


def _nunchaku_files(folder: Path, files: list[str]) -> list[Path]:
    missing = [name for name in NUNCHAKU_NAMES if name not in files]
    if missing:
        raise _error(
            folder,
            f"missing in it: {missing[0]}, one of the two files in which Nunchaku keeps a model."
            " Download it into the folder.")
    return [file_inside(folder, name) for name in NUNCHAKU_NAMES]


def _indexed_files(folder: Path, name: str) -> tuple[list[Path], dict[str, str]]:
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
            f"missing in it: {join_some(map(display_name, missing), 1)}, of the {len(files)} files"
            f" that its {name} lists. Download all of them into it.")
    return [file_inside(folder, file) for file in files], index


def is_bare(name: str) -> bool:
    """Returns whether `name` is only a file name, without folder or drive, on any system."""
    return PureWindowsPath(name).name == name
