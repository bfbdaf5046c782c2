"""safetensors files (https://github.com/huggingface/safetensors#format), with what quantisers keep
in them (`bitsandbytes`).

| part | content |
|---|---|
| header length | u64, little endian |
| header | JSON: name -> `dtype`, `shape`, `data_offsets` [start, end); `__metadata__`: string -> string |
| data | offsets count from its start |
"""
import math
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ...ops.bounded_json import read_json
from .bitsandbytes import join_parts
from .container import (
    COUNTABLE,
    PLAIN_DTYPES,
    Entry,
    ProgressIter,
    WeightFile,
    WeightFileError,
    map_file,
    safe_repr,
)
from .unsupported_quantizers import reject_unsupported_quantizers

MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no more either

SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.safetensors)", re.IGNORECASE)


class SafetensorsFile(WeightFile):
    """The weights of one safetensors file, or of one split in several
    (`name-00001-of-00003.safetensors`, opened by any).

    entries: the tensors as they lie in the files, before `state_dict` puts together what belongs
    together. Raises WeightFileError.
    """

    magic = b"{"
    dtypes = (
        PLAIN_DTYPES
        | {
            "U8": torch.uint8,
            "U16": torch.uint16,
            "U32": torch.uint32,
            "U64": torch.uint64,
            "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "C64": torch.complex64,
        }
        | ({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {})
    )  # torch 2.7

    def __init__(self, path: str | Path, paths: Sequence[Path] | None = None):
        """path: as asked for, named in errors. paths: the files to read, where they are not to be
        told from `path`."""
        path = Path(path)
        paths = _shards(path) if paths is None else paths
        buffers, metadata, entries = [], [], {}
        for part, name in enumerate(paths):
            buffers.append(map_file(name))
            found, texts = _read_header(name, buffers[-1], part, self.dtypes)
            twice = next((key for key in found if key in entries), None)
            if twice is not None:
                raise WeightFileError(
                    f"{name.name}: {safe_repr(twice)} is in {paths[entries[twice].part].name} too. "
                    f"Download all files of the model again from one place.")
            entries |= found
            metadata.append(texts)
        super().__init__(path, paths, buffers, ChainMap(*metadata), entries)

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        return head[8:9] == cls.magic and int.from_bytes(head[:8], "little") < 1 << 32

    def alignment(self, dtype):
        # Tensors lie without gaps, ordered by the size of their elements: one quant_state of an odd
        # length, and no 4-bit weight behind it is at a multiple of 8. Copying them would take the
        # memory of the model.
        return dtype.itemsize

    def state_dict(self, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
        """Name -> tensor, not copied, with each weight that bitsandbytes packed put together
        (`bitsandbytes.put_together`).

        Everything else is as it is in the file, quantised layers in the host's own form too. Packed
        tensors show float32. Scales that are quantised themselves are expanded to float32, which
        takes most of the time.
        """
        tensors = join_parts(self, super().state_dict(), track)
        reject_unsupported_quantizers(self, tensors)
        return tensors


def is_shard(path: str | Path) -> bool:
    """Whether a file is named as one of several that hold one model."""
    names = SHARD.fullmatch(Path(path).name)
    return names is not None and int(names[3]) > 1


def _shards(path: Path) -> list[Path]:
    """All files of the model that `path` is one file of."""
    names = SHARD.fullmatch(path.name)
    if names is None or not 1 <= int(names[3]) <= 1000 or int(names[2]) > int(names[3]):
        return [path]
    paths = [
        path.with_name(f"{names[1]}{number:05d}-of-{names[3]}{names[4]}")
        for number in range(1,
                            int(names[3]) + 1)
    ]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing and path.name not in missing:
        raise WeightFileError(
            f"{path.name} is one file of a model split into {len(paths)}; {missing[0]} is missing"
            f" beside it{f' and {len(missing) - 1} more are' if missing[1:] else ''}. Download all"
            f" {len(paths)} into one folder."
        )
    return [path] if missing else paths


def _read_header(path: Path, buffer, part: int,
                 dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one file in the order of their data, and its metadata, all checked against the
    file's size."""

    def damaged(problem: str) -> WeightFileError:
        return WeightFileError(
            f"{path.name}: {problem}. The file is damaged or its download incomplete; download it"
            " again."
        )

    size = len(buffer)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if size < 8 or start > size or start > MAX_HEADER_BYTES:
        raise damaged(f"the header should end at byte {start}, the file ends at byte {size}")
    try:
        header = read_json(buffer[8:start].decode(), object_pairs_hook=_unique)
    except ValueError as error:
        raise damaged(f"the header is not readable ({safe_repr(str(error))})") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(header, dict) or not isinstance(metadata, dict):
        raise damaged("the header is not a JSON object of tensors")

    if not header:
        raise damaged("it is a safetensors file without a tensor")
    entries = []
    for name, info in header.items():
        try:
            dtype, shape, (first, last) = info["dtype"], info["shape"], info["data_offsets"]
            numbers = all(
                type(number) is int and 0 <= number <= COUNTABLE
                for number in [*shape, first, last])
            numbers = numbers and math.prod(max(size, 1) for size in shape) <= COUNTABLE
        except (TypeError, KeyError, ValueError):
            numbers = False
        if not numbers:
            raise damaged(
                f"the description of {safe_repr(name)} is {safe_repr(info)}, not a dtype, shape"
                " and two data_offsets"
            )
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise WeightFileError(
                f"{path.name}: {safe_repr(name)} has the type {safe_repr(dtype)}, which cannot be "
                f"read. Supported are {', '.join(dtypes)}. Get another conversion, or update this"
                " pack.")
        nbytes = math.prod(shape) * dtypes[dtype].itemsize
        if last - first != nbytes:
            raise damaged(
                f"{safe_repr(name)} of type {dtype} and shape {shape} takes {nbytes} bytes,"
                f" {last - first} are given"
            )
        if start + last > size:
            raise damaged(
                f"{safe_repr(name)} should end at byte {start + last}, the file ends at byte {size}"
            )
        entries.append(Entry(name, tuple(shape), tuple(shape), dtype, start + first, nbytes, part))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for before, after in pairwise(entries):
        if before.offset + before.nbytes > after.offset:
            raise damaged(
                f"the tensors {safe_repr(before.name)} and {safe_repr(after.name)} overlap")
    return {entry.name: entry for entry in entries}, {
        key: str(value) for key, value in metadata.items()
    }


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found
