"""LoRAs that torch saved (.pt, .ckpt, .bin): pickles, of which tensors are taken and nothing is
run."""
import io
import pickle
import zipfile
from pathlib import Path

import torch

from ..files.container import WeightFileError, first_line, map_file


def read_torch_file(path: str) -> dict[str, torch.Tensor]:
    """Name -> tensor on the CPU, of a dict, its `state_dict` or the one dict in it. Raises
    WeightFileError, one plain sentence.

    torch reads it from memory: from a file it would set aside as much as a damaged length asks for.
    """
    name, content = Path(path).name, io.BytesIO(map_file(path))
    try:
        _refuse_bombs(content)
        found = torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightFileError(
            f"{name} cannot be read as a LoRA: it is damaged, or holds more than tensors, which"
            " could be a program and is not run. Get it as safetensors.") from error
    except Exception as error:  # torch's readers raise whatever the damage comes to
        raise WeightFileError(
            f"{name} cannot be read as a LoRA: the file is damaged or incomplete"
            f" ({first_line(error)}). Download it again.") from error
    if not isinstance(found, dict):
        return {}
    inner = found.get("state_dict", next(iter(found.values())) if len(found) == 1 else None)
    weights = inner if isinstance(inner, dict) else found
    tensors = {
        key: value for key, value in weights.items()
        if isinstance(value, torch.Tensor) and isinstance(key, str)
    }
    for key, tensor in tensors.items():
        if not _is_plain(tensor):
            raise WeightFileError(
                f"{name} cannot be read as a LoRA: its {key!a:.100} is no plain tensor, or larger"
                " than what the file holds of it. Get it as safetensors.")
    return tensors


def _refuse_bombs(content: io.BytesIO):
    """Raises ValueError for a zip file that would become larger when it is read; torch compresses
    nothing."""
    if content.getbuffer()[:2] == b"PK":
        with zipfile.ZipFile(content) as archive:
            files = archive.infolist()
        if any(file.compress_type for file in files) or sum(file.file_size for file in files) > len(
            content.getbuffer()
        ):
            raise ValueError("it is compressed, as torch does not save")
        content.seek(0)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it lies in memory with all of its values, each once."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )
