"""Reads files that torch saved (.pt, .ckpt, .bin): pickles, read without running anything."""
import io
import pickle
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..byte_sizes import size_text
from ..container.weight_file import TensorEntry, WeightFile, WeightFileError, first_line, map_file
from ..refusals.wrong_format import ARCHIVE
from .safetensors import SafetensorsFile

# What the pickle of a file of tensors names. torch allows more, such as `bytearray`, of which a
# file of 179 bytes makes any number of bytes.
GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v[23]|parameter)"
    r"|torch(\.storage)? (\w+Storage|Size|(b?float|u?int|complex)\d+\w*|bool)")
MOST_COPIES = 2  # of the bytes of a file, that views of its data are copied to
LEGACY_PICKLES = 5  # one after the other, in files from before 2020


class TorchFile(SafetensorsFile):
    """The weights of a model in a file that torch saved.

    Raises:
        WeightFileError: the file is damaged, or holds more than tensors, or other ones.
    """

    def __init__(self, path: Path):
        self._tensors = read_torch_file(str(path), "a model")
        names = {dtype: name for name, dtype in self.dtypes.items()}
        other = {tensor.dtype for tensor in self._tensors.values()} - names.keys()
        if other or not self._tensors:
            raise WeightFileError(f"{path.name} holds {next(iter(other), 'no tensors')}, expected"
                                  " the weights of a model. Pick another file.")
        WeightFile.__init__(self, path, [path], [map_file(path)], {}, {
            name: TensorEntry(name, tuple(tensor.shape), tuple(tensor.shape), names[tensor.dtype],
                              0, tensor.nbytes) for name, tensor in self._tensors.items()})

    @staticmethod
    def recognises(head: bytes) -> bool:
        return head.startswith((b"PK\x03\x04", *(b"\x80%c" % protocol for protocol in range(2, 6))))

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def read_torch_file(path: str, what: str = "a LoRA") -> dict[str, torch.Tensor]:
    """Reads the tensors of a file: those of a dict, of its `state_dict` or of the only dict in it.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        WeightFileError: if the file is damaged or holds more than tensors.
    """
    loaded = read_torch_object(path, what)
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
                f"{Path(path).name} cannot be read as {what}: its {key!a:.100} is not a plain"
                " tensor, or is larger than its data in the file. Get it as safetensors.")
    copied = sum(tensor.nbytes for tensor in tensors.values() if not tensor.is_contiguous())
    if copied > MOST_COPIES * Path(path).stat().st_size:
        raise WeightFileError(
            f"{Path(path).name} cannot be read as {what}: its tensors are views of few values, and"
            f" would take {size_text(copied)}. Get it as safetensors.")
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def read_torch_object(path: str, what: str) -> Any:
    """Returns the object in a file that torch saved, of tensors on the CPU and plain containers.

    torch reads a zip file as it is, whose lengths are checked, and others from memory: from a file
    it would allocate as much as a damaged length says.

    Args:
        path: of the file.
        what: it should hold, such as "a LoRA", for messages.

    Raises:
        WeightFileError: if the file is damaged or holds more than tensors.
    """
    name = Path(path).name
    mapped = map_file(path)
    is_zip = mapped[:2] == b"PK"
    try:
        with open(path, "rb") if is_zip else io.BytesIO(mapped) as content:
            if is_zip:
                _check_archive(content, len(mapped))
            else:
                _check_legacy(content)
            content.seek(0)
            return torch.load(content, map_location="cpu", weights_only=True)
    except WeightFileError as error:
        raise WeightFileError(f"{name}: {error}") from error
    except pickle.UnpicklingError as error:
        raise WeightFileError(
            f"{name} cannot be read as {what}: it is damaged, or holds more than tensors, which"
            " could be a program and is not run. Get it as safetensors.") from error
    except Exception as error:  # torch's readers raise anything for damaged files
        raise WeightFileError(
            f"{name} cannot be read as {what}: the file is damaged or incomplete"
            f" ({first_line(error)}). Download it again.") from error


def _check_archive(content: BinaryIO, size: int):
    """Raises ValueError for a zip file that would grow when it is read, as torch's never do,
    WeightFileError for one that is no file of torch's, and as `_check_pickle`."""
    with zipfile.ZipFile(content) as archive:
        files = archive.infolist()
        pickles = [file for file in files if file.filename.endswith(".pkl")]
        if not pickles:
            raise WeightFileError(ARCHIVE)
        if any(file.compress_type for file in files) or sum(
                file.file_size for file in files) > size:
            raise ValueError("it is compressed, which torch never does")
        for file in pickles:
            _check_pickle(io.BytesIO(archive.read(file)))


def _check_legacy(content: BinaryIO):
    """Raises UnpicklingError for a file of torch before 0.4, and as `_check_pickle`."""
    if tarfile.is_tarfile(content):
        raise pickle.UnpicklingError("it is of torch before 0.4")
    content.seek(0)
    for _ in range(LEGACY_PICKLES):
        _check_pickle(content)


def _check_pickle(content: BinaryIO):
    """Raises UnpicklingError for a pickle that names anything but `GLOBALS`."""
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
