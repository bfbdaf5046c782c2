"""What the cache keeps of a model that was packed while it was loaded: a file that *Save Packed
Model* could have written of it, with all its weights.

ComfyUI's own types are in safetensors with its markers, which it opens without this pack, NF4 in
safetensors with bitsandbytes' names, and ggml's types in GGUF. Of a checkpoint the file has the
diffusion model alone: its other parts are not packed. Of a ControlNet in diffusers' names it has
joined weights in ComfyUI's, which ComfyUI knows by the others. Weights that the file cannot hold,
which another quantiser packed and which stay as they are, are left out.

| metadata | content |
|---|---|
| `featherweight.entry` | JSON: `digests`, name -> SHA-256 of a weight's bytes, and `loss` |
"""
import functools
import hashlib
import json
import operator
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ops.bounded_json import read_json
from ...ops.packing.pack_types import TYPES, pack_type
from ...ops.tensor.packed_layout import QuantizedTensor, is_packed, packed_tensors
from ..comfyui.comfy_quant_weights import as_tensors, read_marked
from ..container.weight_file import PLAIN_DTYPES, WeightFile, safe_repr
from ..files.open_weights import open_weights
from ..files.packed_cache import PackedTypes
from ..files.safetensors_writer import PACKED_TYPES
from ..packing.planning.file_plan import (
    KEEP_TYPES,
    SaveOptions,
    is_safetensors,
    keep_type,
    plan_file,
    written_name,
)
from ..packing.save import save
from ..packing.source import CONFIG, MARKERS, Source, Weight

NOTE = "featherweight.entry"
# most bytes of a file's header, beyond those of the weights: of all, and of each weight
HEADER, HEADER_OF_WEIGHT = 1 << 16, 1 << 11


@dataclass(frozen=True)
class CacheEntry:
    """What was read of an entry.

    Attributes:
        weights: name -> packed or plain weight.
        loss: power of the error over that of the packed weights, 0 where it is not shown.
    """

    weights: dict[str, torch.Tensor]
    loss: float


def suffix_for(pack_to: str | int) -> str:
    """Returns the suffix of a file of weights that are packed to a type or a size."""
    return ".safetensors" if pack_to in PACKED_TYPES else ".gguf"


def most_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Returns the bytes that an entry with these weights takes at most, about."""
    return HEADER + sum(
        HEADER_OF_WEIGHT + sum(part.nbytes for part in _parts(tensor))
        for tensor in tensors.values())


def entry_weights(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the weights of a state dict that are in its entry, without the model's prefix."""
    return {
        name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
        if name.startswith(prefix) or name in MARKERS}


def write_entry(path: Path, file: WeightFile, tensors: Mapping[str, torch.Tensor],
                loss: float):
    """Writes an entry, whole or not at all.

    Args:
        path: of the entry; its suffix is that of `suffix_for`.
        file: that the weights come from, for the metadata that ComfyUI reads. Only who may read it
            may read the entry.
        tensors: of `entry_weights`.
        loss: see `CacheEntry`.

    Raises:
        ValueError: with a sentence on why it cannot be written.
    """
    safetensors = is_safetensors(path)
    weights = {name: Weight(name, name, tuple(tensor.shape), tensor, _unread)
               for name, tensor in tensors.items()}
    weights = {name: weight for name, weight in weights.items()  # those that a file holds exactly
               if not weight.is_number or keep_type(weight, safetensors) == weight.stored_type}
    metadata = {key: text for key, text in file.text_metadata.items() if key == CONFIG}
    digests = _digests({name: tensors[name] for name in weights})
    note = json.dumps({"digests": digests, "loss": loss})
    mode = functools.reduce(operator.and_, (path.stat().st_mode & 0o666 for path in file.paths))
    # writable, for what removes the part of a killed writer
    options = SaveOptions(metadata={NOTE: note}, mode=mode | stat.S_IWUSR)
    save(plan_file(Source(weights, metadata=metadata), path, KEEP_TYPES, options))


def read_entry(path: Path, wanted: PackedTypes) -> CacheEntry:
    """Reads weights of an entry, mapped, and compares their digests.

    Args:
        path: of the entry.
        wanted: the types of the weights, in the host's names without prefix. A weight whose values
            did not fit into its type is plain.

    Raises:
        KeyError, ValueError: it has not these weights, or their bytes have changed.
    """
    file = open_weights(path)
    note = read_json(file.text_metadata[NOTE])
    if not (isinstance(note, dict) and isinstance(note.get("digests"), dict)
            and isinstance(note.get("loss"), float)):
        raise ValueError(f"its metadata {NOTE} is damaged")
    stored = as_tensors(file, read_marked(file))
    types = {name: type_name for name, (type_name, _) in wanted.items()}
    weights = {name: _checked(name, stored[written_name(name, types)], *expected)
               for name, expected in wanted.items()}
    for name, digest in _digests(weights).items():
        if digest != note["digests"][name]:
            raise ValueError(f"the bytes of {safe_repr(name)} have changed on the drive")
    file.drop_pages()
    return CacheEntry(weights, note["loss"])


def _checked(name: str, tensor: torch.Tensor, type_name: str,
             shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a weight of an entry; raises ValueError if it is in another type or shape."""
    if not is_packed(tensor) and not shape and tensor.numel() == 1:
        tensor = tensor.view(shape)  # GGUF has no scalars
    if is_packed(tensor):
        is_expected = (type_name not in PLAIN_DTYPES
                       and tensor.params.format == pack_type(type_name).format_of(shape))
    else:
        plain = [PLAIN_DTYPES[each.name] for each in TYPES.values() if each.is_plain]
        is_expected = not isinstance(tensor, QuantizedTensor) and tensor.dtype in plain
    if not is_expected or tuple(tensor.shape) != shape:
        raise ValueError(f"{safe_repr(name)} is not {type_name} of shape {shape}")
    return tensor


def _unread(start: int, stop: int) -> torch.Tensor:
    raise ValueError("A weight that is copied bit for bit was to be read.")


def _digests(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns name -> digest of a weight, packed or plain."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets others run
        return dict(zip(weights, pool.map(_digest, weights.values())))


def _digest(tensor: torch.Tensor) -> str:
    found = hashlib.sha256()
    for part in _parts(tensor):
        if part.numel():
            found.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(packed_tensors(tensor)) if is_packed(tensor) else (tensor,)
