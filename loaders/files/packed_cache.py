"""A cache on disk for weights packed while loading: one safetensors file per model.

It lies in ComfyUI's user folder and keeps what took longer than `MIN_SECONDS` to pack. The
environment (`FEATHERWEIGHT_PACKED_CACHE`) names another folder, where all is kept, or turns it off.
The key of an entry is what it was made of: the files with their sizes and times, the type of each
weight, and the version of the packers. When the cache reaches its limit, or the drive has little
room, the least recently used entries are removed; the time of an empty file `.used` is that of an
entry's last use. Other files in the folder are not touched. If an entry cannot be used, the model
loads without it.

| in an entry | content |
|---|---|
| `X` | U8, the blocks of the weight X |
| `X.scale` ... | F32 or U8, what the format stores beside them, by its names |
| `featherweight.digests` | U8, SHA-256 of each other tensor, sorted by name |

A load compares the digests, and finds what a drive has changed. Entries of 0.2.1 and before have
none and are not checked.
"""
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch

from ...ops.quantize.row_types import format_of
from ...ops.tensor.packed_layout import packed_tensor, packed_tensors
from ...ops.tensor.packed_tensor import PackedTensor
from ..byte_sizes import size_text
from .atomic_file import WriteError, remove_stale_parts
from .container import FileState, WeightFile, WeightFileError, safe_repr
from .safetensors import SafetensorsFile
from .safetensors_writer import DTYPES, file_size, safetensors_writer

log = logging.getLogger(__name__)

FOLDER, LIMIT = "FEATHERWEIGHT_PACKED_CACHE", "FEATHERWEIGHT_PACKED_CACHE_GB"
OFF = "off"  # in place of a folder
LIMIT_GB = 50.0  # default
MIN_SECONDS = 60  # that packing took of what is kept where no folder is named
FREE_SHARE, MAX_FREE = 0.1, 20e9  # of a drive, and bytes of it: the smaller is left free
PACKER_VERSION = 3  # raised when the packers make other bytes of the same weights
NAMES = "featherweight-*.safetensors"
DIGESTS = "featherweight.digests"
DIGEST_BYTES = hashlib.sha256().digest_size

# Name of a weight -> (packed format, logical shape).
PackedTypes = Mapping[str, tuple[str, tuple[int, ...]]]


def folder(default: Path) -> Path | None:
    """Returns the folder of the cache, None where it is turned off.

    Args:
        default: where it lies unless the environment names another one.
    """
    named = os.environ.get(FOLDER, "")
    if named.lower() == OFF:
        return None
    return Path(named) if named else default


def keeps(seconds: float) -> bool:
    """Returns whether what took so long to pack is kept."""
    return bool(os.environ.get(FOLDER)) or seconds > MIN_SECONDS


def entry_path(file: WeightFile, types: PackedTypes, folder: Path | None) -> Path | None:
    """Returns the path of the entry for these weights of a file, None if they are not cached."""
    if folder is None or not types:
        return None
    files = [(str(path.resolve()), state.identity) for path, state in zip(file.paths, file.states)]
    recipe = [PACKER_VERSION, files, sorted(types.items())]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:40]
    return folder / NAMES.replace("*", digest)


def read(entry: Path | None, types: PackedTypes) -> dict[str, torch.Tensor] | None:
    """Returns name -> packed weight of an entry, mapped; None if it is missing or damaged."""
    if entry is None or not entry.is_file():
        return None
    try:
        weights = _read(entry, types)
        # The entry itself stays untouched: other processes map it and check its time.
        with contextlib.suppress(OSError):  # another user's entry, or a read-only drive
            _last_use(entry).touch()
        return weights
    except (WeightFileError, KeyError, ValueError, OSError) as error:
        log.warning(
            "[Featherweight] The packed weights in %s cannot be used (%s), so they are packed"
            " again.", entry, error)
    with contextlib.suppress(OSError):  # Windows: after the error, which keeps the file mapped
        entry.unlink()
    return None


def _read(entry: Path, types: PackedTypes) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(entry, [entry])
    has_digests = DIGESTS in file.entries
    for part, expected in _all_parts(types, has_digests).items():
        stored = file.entries[part]
        if (stored.shape, stored.format) != expected:
            raise ValueError(f"{part} is {stored.format} {stored.shape}, expected {expected}")
    weights = {
        name: _packed(file, name, type_name, shape) for name, (type_name, shape) in types.items()
    }
    if has_digests:
        _check_digests(weights, file.tensor(DIGESTS))
        file.drop_pages()
    return weights


def _last_use(entry: Path) -> Path:
    """Returns the empty file whose time is that of the entry's last use."""
    return entry.with_suffix(".used")


def _packed(file: SafetensorsFile, name: str, type_name: str,
            shape: tuple[int, ...]) -> torch.Tensor:
    packed_format = format_of(type_name, shape)
    sides = (file.tensor(f"{name}.{qparam.name}") for qparam in packed_format.qparams)
    return packed_tensor(packed_format, file.tensor(name), shape, torch.float32, *sides)


def _check_digests(weights: Mapping[str, torch.Tensor], stored: torch.Tensor):
    """Raises ValueError if the bytes of a weight are not those that were written.

    Args:
        weights: name -> packed weight, all of an entry.
        stored: the bytes of `featherweight.digests`.
    """
    digests, expected = _digests_of(weights), stored.clone().numpy().tobytes()
    for index, part in enumerate(sorted(digests)):
        if digests[part] != expected[index * DIGEST_BYTES:(index + 1) * DIGEST_BYTES]:
            raise ValueError(f"the bytes of {safe_repr(part)} have changed on the drive")


def _parts_of(name: str, weight: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Returns the tensors of a packed weight by their names in an entry."""
    weight = cast(PackedTensor, weight)
    sides = (f"{name}.{qparam.name}" for qparam in weight.params.format.qparams)
    return zip((name, *sides), packed_tensors(weight))


def _digests_of(weights: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Returns the digest of each tensor of an entry by its name."""
    parts = dict(part for name, weight in weights.items() for part in _parts_of(name, weight))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets others run
        return dict(zip(parts, pool.map(_digest_of, parts.values())))


def _digest_of(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data).digest()


def keep(entry: Path | None, weights: Mapping[str, torch.Tensor], types: PackedTypes) -> bool:
    """Writes an entry, whole or not at all; why it is not written is in the log.

    Args:
        entry: its path, None to write nothing.
        weights: name -> packed weight, those of `types`.
        types: of the weights.

    Returns:
        Whether it is written.
    """
    if entry is None:
        return False
    tensors = _all_parts(types, with_digests=True)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        size = file_size(tensors, {})
        if not _free_space(entry.parent, size):
            log.warning(
                "[Featherweight] %s of packed weights are not cached in %s: its limit is %s (%s),"
                " and some of the drive is left free.", size_text(size), entry.parent,
                size_text(_limit()), LIMIT)
            return False
        digests = _digests_of(weights)
        with safetensors_writer(entry, tensors, {}) as writer:
            for name in types:
                for part, tensor in _parts_of(name, weights[name]):
                    writer.write(part, DTYPES[tensor.dtype], [tensor.cpu()])
            joined = b"".join(digests[part] for part in sorted(digests))
            writer.write(DIGESTS, "U8", [torch.frombuffer(bytearray(joined), dtype=torch.uint8)])
    except (WriteError, OSError) as error:  # another process may have written it meanwhile
        log.warning("[Featherweight] The packed weights are not cached: %s", error)
        return False
    _free_space(entry.parent, 0, keep=entry)  # another process may have written others meanwhile
    return True


def _all_parts(types: PackedTypes,
               with_digests: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the tensors of an entry: name -> (shape, type)."""
    parts = {}
    for name, (type_name, shape) in types.items():
        packed, values = format_of(type_name, shape), math.prod(shape)
        parts[name] = (-(-values * packed.block_bytes // packed.block_length),), "U8"
        for qparam in packed.qparams:
            length = qparam.length(-(-values // packed.block_length))
            parts[f"{name}.{qparam.name}"] = (length,), DTYPES[qparam.dtype]
    if with_digests:
        parts[DIGESTS] = (DIGEST_BYTES * len(parts),), "U8"
    return parts


def _limit() -> float:
    """Returns the limit in bytes for all entries together."""
    text = os.environ.get(LIMIT, "")
    try:
        return float(text or LIMIT_GB) * 1e9
    except ValueError:
        log.warning("[Featherweight] %s is %r, not a number of GB; using %g.", LIMIT, text,
                    LIMIT_GB)
        return LIMIT_GB * 1e9


def _free_space(folder: Path, size: int, keep: Path | None = None) -> bool:
    """Removes entries until `size` more bytes are within the limit, and leave room on the drive.

    Args:
        folder: folder of the cache.
        size: bytes needed.
        keep: an entry that is not removed.

    Returns:
        Whether they are.
    """
    if size > _limit():
        return False
    remove_stale_parts(folder)
    entries = []
    for path in (*folder.glob(NAMES), *folder.glob(f"{NAMES}.*.part")):
        with contextlib.suppress(OSError):  # another process may have removed it
            status, last_use = path.stat(), FileState.of(_last_use(path))
            time = max(status.st_mtime_ns, last_use.time if last_use else 0)
            entries.append((time, status.st_size, path))
    disk = shutil.disk_usage(folder)
    free = disk.free - min(MAX_FREE, disk.total * FREE_SHARE)
    total = sum(nbytes for _, nbytes, _ in entries)
    removable = sum(nbytes for _, nbytes, path in entries if path != keep)
    if size > free + removable:
        return False
    for _, nbytes, path in sorted(entries):
        if total + size <= _limit() and size <= free:
            break
        if path != keep and path.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # Windows does not remove a file that is in use
                path.unlink()
                total -= nbytes
                free += nbytes
                _last_use(path).unlink()
    return total + size <= _limit() and size <= free
