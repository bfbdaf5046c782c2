"""Reads files that torch saved (.pt, .ckpt, .bin): pickles, read without running anything."""
import io
import pickle
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..container.weight_file import WeightFileError, first_line, map_file

# What the pickle of a file of tensors names. torch allows more, such as `bytearray`, of which a
# file of 179 bytes makes any number of bytes.
GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch(\.storage)? (\w+Storage|Size|(b?float|u?int|complex)\d+\w*|bool)")
LEGACY_PICKLES = 5  # one after the other, in files from before 2020


def read_torch_file(path: str) -> dict[str, torch.Tensor]:
    """Reads the tensors of a LoRA: those of a dict, of its `state_dict` or of the only dict in it.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        WeightFileError: if the file is damaged or holds more than tensors.
    """
    loaded = read_torch_object(path, "a LoRA")
    if not isinstance(loaded, dict):
        return {}
    only_value = next(iter(loaded.values())) if len(loaded) == 1 else None
    inner = loaded.get("state_dict", only_value)
    weights = inner if isinstance(inner, dict) else loaded
    tensors = {
        key: value for key, value in weights.items()
        if isinstance(value, torch.Tensor) and isinstance(key, str)
    }
    for key, tensor in tensors.items():
        if not is_plain(tensor):
            raise WeightFileError(
                f"{Path(path).name} cannot be read as a LoRA: its {key!a:.100} is not a plain"
                " tensor, or is larger than its data in the file. Get it as safetensors.")
    return tensors


def read_torch_object(path: str, what: str) -> Any:
    """Returns the object in a file that torch saved, of tensors on the CPU and plain containers.

    torch reads from memory here: from a file it would allocate as much as a damaged length says.

    Args:
        path: of the file.
        what: it should hold, such as "a LoRA", for messages.

    Raises:
        WeightFileError: if the file is damaged or holds more than tensors.
    """
    name = Path(path).name
    content = io.BytesIO(map_file(path))
    try:
        _reject_compressed(content)
        _reject_other_globals(content)
        return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightFileError(
            f"{name} cannot be read as {what}: it is damaged, or holds more than tensors, which"
            " could be a program and is not run. Get it as safetensors.") from error
    except Exception as error:  # torch's readers raise anything for damaged files
        raise WeightFileError(
            f"{name} cannot be read as {what}: the file is damaged or incomplete"
            f" ({first_line(error)}). Download it again.") from error


def _reject_compressed(content: io.BytesIO):
    """Raises ValueError for a zip file that would grow when it is read; torch's are not compressed.
    """
    if content.getbuffer()[:2] == b"PK":
        with zipfile.ZipFile(content) as archive:
            files = archive.infolist()
        size = sum(file.file_size for file in files)
        if any(file.compress_type for file in files) or size > len(content.getbuffer()):
            raise ValueError("it is compressed, which torch never does")
        content.seek(0)


def _reject_other_globals(content: io.BytesIO):
    """Raises UnpicklingError for a pickle that names anything but `GLOBALS`."""
    if content.getbuffer()[:2] == b"PK":
        with zipfile.ZipFile(content) as archive:
            pickles = [archive.read(file) for file in archive.infolist()
                       if file.filename.endswith(".pkl")]
        for data in pickles:
            _check_pickle(io.BytesIO(data))
    elif tarfile.is_tarfile(content):
        raise pickle.UnpicklingError("it is of torch before 0.4")
    else:
        content.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_pickle(content)
    content.seek(0)


def _check_pickle(content: io.BytesIO):
    texts = ["", ""]
    for opcode, argument, _ in pickletools.genops(content):
        name = None
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument)
        elif opcode.name == "STACK_GLOBAL":
            name = " ".join(texts)
        elif opcode.name.startswith("EXT"):
            name = opcode.name
        elif isinstance(argument, str) and "PUT" not in opcode.name:
            texts = [texts[1], argument]
        if name is not None and not GLOBALS.fullmatch(name):
            raise pickle.UnpicklingError(f"it names {name!a:.100}")


def is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is dense, on the CPU, and has memory for all of its values."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )
