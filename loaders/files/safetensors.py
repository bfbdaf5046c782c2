"""Reads safetensors files (https://github.com/huggingface/safetensors#format).

| part | content |
|---|---|
| header length | u64, little endian |
| header | JSON: name -> `dtype`, `shape`, `data_offsets` [start, end) |
| | `__metadata__`: string -> string |
| data | offsets count from its start |
"""
import functools
import math
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ..container.weight_file import (
    CONFIG_KEY,
    COUNTABLE,
    PLAIN_DTYPES,
    MappedFile,
    ProgressIter,
    TensorEntry,
    WeightFile,
    WeightFileError,
    map_file,
    safe_repr,
)
from ..name_lists import join_some
from ..quantizers.registry import join_quantized_weights
from .mlx_names import channels_first, with_common_names

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_EMPTY = 1 << 20  # product of the other sizes of a tensor of which one size is 0

SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.safetensors)", re.IGNORECASE)


class SafetensorsFile(WeightFile):
    """The weights of one safetensors file, or of all files of a split model.

    A split model (`name-00001-of-00003.safetensors`) is opened by any of its files. `entries` are
    the tensors as stored; `state_dict` joins the parts of packed weights.

    Args:
        path: the file requested, which errors name.
        paths: the files to read; by default `path` and, if it is one of several, the others.

    Raises:
        WeightFileError: a file is missing, damaged or has a dtype that is not supported.
    """

    dtypes = PLAIN_DTYPES | {
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
    }
    if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
        dtypes["F8_E8M0"] = torch.float8_e8m0fnu

    def __init__(self, path: str | Path, paths: Sequence[Path] | None = None):
        path = Path(path)
        paths = _shards(path) if paths is None else paths
        buffers, metadata, entries = [], [], {}
        for part, part_path in enumerate(paths):
            buffers.append(map_file(part_path))
            part_entries, part_metadata = _read_header(part_path, buffers[-1], part, self.dtypes)
            part_entries = with_common_names(part_path.name, part_entries, part_metadata)
            duplicate = next((name for name in part_entries if name in entries), None)
            if duplicate is not None:
                other = paths[entries[duplicate].part]
                raise WeightFileError(
                    f"{part_path.name}: {safe_repr(duplicate)} is in {other.name} too. Download all"
                    " files of the model again from one place.")
            entries |= part_entries
            metadata.append(part_metadata)
        super().__init__(path, paths, buffers, ChainMap(*metadata), entries)

    @staticmethod
    def recognises(head: bytes) -> bool:
        """Returns whether a file with these first bytes is of this container."""
        return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32

    def alignment(self, dtype: torch.dtype | None) -> int:
        # Tensors follow each other without gaps, ordered by element size: after one quant_state of
        # an odd length no 4-bit weight is at a multiple of 8, and copying them all would take as
        # much memory as the model.
        return dtype.itemsize if dtype else 1

    @functools.cached_property
    def quantization(self) -> Mapping[str, Any]:
        try:
            settings = read_json(self.metadata.get(CONFIG_KEY, ""))
        except ValueError:
            return {}
        return settings if isinstance(settings, dict) else {}

    def state_dict(self, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
        """Returns name -> tensor, with the parts of each packed weight joined.

        All other tensors are as in the file, also those of ComfyUI's own quantised formats. Mapped
        tensors are not copied. Packed tensors have the dtype float32 until a layer gives them the
        model's. Quantised scales are expanded to float32, which takes most of the time.

        Args:
            track: iterates over the names and shows progress.

        Raises:
            WeightFileError: the file changed meanwhile, or its quantiser is not supported.
        """
        tensors = super().state_dict()
        channels_first(tensors, self.metadata)
        join_quantized_weights(self, tensors, track)
        return tensors


def is_shard(path: str | Path) -> bool:
    """Returns whether a file is by its name one of several files of a model."""
    match = SHARD.fullmatch(Path(path).name)
    return match is not None and int(match[3]) > 1


def _shards(path: Path) -> list[Path]:
    """Returns all files of the model of which `path` is one file."""
    match = SHARD.fullmatch(path.name)
    if match is None or not 1 <= int(match[3]) <= 1000 or int(match[2]) > int(match[3]):
        return [path]
    paths = [
        path.with_name(f"{match[1]}{number:05d}-of-{match[3]}{match[4]}")
        for number in range(1, int(match[3]) + 1)
    ]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing and path.name not in missing:
        raise WeightFileError(
            f"{path.name} is one file of a model split into {len(paths)}; missing in its folder:"
            f" {join_some(missing, 1)}. Download all {len(paths)} into one folder."
        )
    return [path] if missing else paths


def _read_header(
        path: Path, buffer: MappedFile, part: int, dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Reads the header of one file and checks it against the file's size.

    Args:
        path: the file.
        buffer: its mapped bytes.
        part: its index among the files of the model.
        dtypes: name in the file -> dtype.

    Returns:
        Name -> TensorEntry, in the order of the data, and the metadata.
    """

    def damage_error(problem: str) -> WeightFileError:
        return WeightFileError(
            f"{path.name}: {problem}. The file is damaged or its download incomplete; download it"
            " again."
        )

    size = len(buffer)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if size < 8 or start > size or start > MAX_HEADER_BYTES:
        raise damage_error(f"the header should end at byte {start}, the file ends at byte {size}")
    try:
        header = read_json(buffer[8:start].decode(), object_pairs_hook=_unique_dict)
    except ValueError as error:
        raise damage_error(f"the header is not valid JSON ({safe_repr(str(error))})") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(header, dict) or not isinstance(metadata, dict):
        raise damage_error("the header is not a JSON object of tensors")

    if not header:
        raise damage_error("it is a safetensors file without a tensor")
    entries = []
    for name, info in header.items():
        fields = _tensor_fields(info)
        if fields is None:
            raise damage_error(
                f"the description of {safe_repr(name)} is {safe_repr(info)}, not a dtype, shape"
                " and two data_offsets"
            )
        dtype, shape, first, last = fields
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise WeightFileError(
                f"{path.name}: {safe_repr(name)} has the type {safe_repr(dtype)}, which cannot be"
                f" read. Supported are {', '.join(dtypes)}. Get another conversion, or update this"
                " pack.")
        nbytes = math.prod(shape) * dtypes[dtype].itemsize
        if last - first != nbytes:
            raise damage_error(
                f"{safe_repr(name)} of type {dtype} and shape {shape} takes {nbytes} bytes, but"
                f" its data_offsets span {last - first}"
            )
        if start + last > size:
            raise damage_error(
                f"{safe_repr(name)} should end at byte {start + last}, the file ends at byte {size}"
            )
        entries.append(TensorEntry(name, tuple(shape), tuple(shape), dtype, start + first, nbytes,
                                   part))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for before, after in pairwise(entries):
        if before.offset + before.nbytes > after.offset:
            raise damage_error(
                f"the tensors {safe_repr(before.name)} and {safe_repr(after.name)} overlap")
    texts = {key: str(value) for key, value in metadata.items()}
    return {entry.name: entry for entry in entries}, texts


def _tensor_fields(info: Any) -> tuple[Any, list[int], int, int] | None:
    """Returns (dtype, shape, start, end) of a header entry; None if these are not valid numbers."""
    try:
        dtype, shape, (first, last) = info["dtype"], info["shape"], info["data_offsets"]
        is_valid = all(
            type(number) is int and 0 <= number <= COUNTABLE for number in [*shape, first, last])
        most = MAX_EMPTY if 0 in shape else COUNTABLE
        is_valid = is_valid and math.prod(max(size, 1) for size in shape) <= most
    except (TypeError, KeyError, ValueError):
        return None
    return (dtype, shape, first, last) if is_valid else None


def _unique_dict(pairs: list[tuple]) -> dict:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("a name is in it twice")
    return items
