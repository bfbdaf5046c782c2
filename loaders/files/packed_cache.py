"""A cache on disk for weights packed while loading: one safetensors file per model.

It is off unless the environment names a folder (`FEATHERWEIGHT_PACKED_CACHE`). The key of an entry
is what it was made of: the files with their sizes and times, the type of each weight, and the
version of the packers. When the cache reaches its limit, the least recently used entries are
removed; the time of an empty file `.used` is that of an entry's last use. Other files in the folder
are not touched. If an entry cannot be used, the model loads without it.

| in an entry | content |
|---|---|
| `X` | U8, the blocks of the weight X |
| `X.scale` | F32, its scales, if the format stores them separately |
| `featherweight.sums` | U8, the sums of all other tensors (`_sum_of`), int64, sorted by name |

A load adds the bytes up again, which takes less time than reading them, and finds what a drive has
changed. Entries of 0.2.1 and before have no sums and are not checked.
"""
import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch

from ...ops.formats.base import FORMATS
from ...ops.tensor.packed_layout import packed_tensor, packed_tensors
from ...ops.tensor.packed_tensor import PackedTensor
from ..byte_sizes import size_text
from .atomic_file import WriteError, remove_stale_parts
from .container import FileState, WeightFile, WeightFileError, safe_repr
from .safetensors import SafetensorsFile
from .safetensors_writer import file_size, safetensors_writer

log = logging.getLogger(__name__)

FOLDER, LIMIT = "FEATHERWEIGHT_PACKED_CACHE", "FEATHERWEIGHT_PACKED_CACHE_GB"
LIMIT_GB = 50.0  # default
PACKER_VERSION = 3  # raised when the packers make other bytes of the same weights
NAMES = "featherweight-*.safetensors"
SUMS = "featherweight.sums"

# Name of a weight -> (packed format, logical shape).
PackedTypes = Mapping[str, tuple[str, tuple[int, ...]]]


def is_enabled() -> bool:
    """Returns whether the environment names a folder for the cache."""
    return bool(os.environ.get(FOLDER))


def entry_path(file: WeightFile, types: PackedTypes) -> Path | None:
    """Returns the path of the entry for these weights of a file, None if they are not cached."""
    if not is_enabled() or not types:
        return None
    files = [(str(path.resolve()), state.identity) for path, state in zip(file.paths, file.states)]
    recipe = [PACKER_VERSION, files, sorted(types.items())]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:40]
    return Path(os.environ[FOLDER]) / NAMES.replace("*", digest)


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
    has_sums = SUMS in file.entries
    for part, expected in _all_parts(types, has_sums).items():
        stored = file.entries[part]
        if (stored.shape, stored.format) != expected:
            raise ValueError(f"{part} is {stored.format} {stored.shape}, expected {expected}")
    weights = {
        name: _packed(file, name, type_name, shape) for name, (type_name, shape) in types.items()
    }
    if has_sums:
        _check_sums(weights, file.tensor(SUMS))
        file.drop_pages()
    return weights


def _last_use(entry: Path) -> Path:
    """Returns the empty file whose time is that of the entry's last use."""
    return entry.with_suffix(".used")


def _packed(file: SafetensorsFile, name: str, type_name: str,
            shape: tuple[int, ...]) -> torch.Tensor:
    scale = file.tensor(f"{name}.scale") if FORMATS[type_name].qparams else None
    return packed_tensor(FORMATS[type_name], file.tensor(name), shape, scale=scale)


def _check_sums(weights: Mapping[str, torch.Tensor], stored: torch.Tensor):
    """Raises ValueError if the bytes of a weight are not those that were written.

    Args:
        weights: name -> packed weight, all of an entry.
        stored: the bytes of `featherweight.sums`.
    """
    sums = {part: _sum_of(tensor) for name, weight in weights.items()
            for part, tensor in _parts_of(name, weight)}
    for part, expected in zip(sorted(sums), stored.clone().view(torch.int64).tolist()):
        if sums[part] != expected:
            raise ValueError(f"the bytes of {safe_repr(part)} have changed on the drive")


def _parts_of(name: str, weight: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Returns the tensors of a packed weight by their names in an entry."""
    return zip((name, f"{name}.scale"), packed_tensors(cast(PackedTensor, weight)))


def _sum_of(tensor: torch.Tensor) -> int:
    """Returns the sum of a tensor's bytes as int64 words, modulo 2^64, and of the bytes left."""
    data = tensor.reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum() + data[whole:].sum())


@contextlib.contextmanager
def entry_writer(entry: Path | None, types: PackedTypes) -> Iterator["EntryWriter"]:
    """Opens an entry for writing; it exists after the block only if all weights were written.

    Args:
        entry: its path, None to write nothing.
        types: the weights that will be written.
    """
    writer = EntryWriter(entry, types)
    try:
        with writer.stack:
            yield writer
            writer.write_sums()
    except WriteError as error:  # for example, another process wrote the same entry meanwhile
        writer.is_written = False
        log.warning("[Featherweight] The packed weights are not cached: %s", error)
    if entry is not None and writer.is_written:
        # Another process may have written entries at the same time.
        _free_space(entry.parent, 0, keep=entry)


class EntryWriter:
    """Writes the weights of an entry; an error is logged and ends the writing.

    Attributes:
        is_written: whether the entry is still being written.
    """

    def __init__(self, entry: Path | None, types: PackedTypes):
        self.stack = contextlib.ExitStack()
        self.is_written = False
        self.sums: dict[str, int] = {}
        if entry is None:
            return
        tensors = _all_parts(types, with_sums=True)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            size = file_size(tensors, {})
            if not _free_space(entry.parent, size):
                log.warning(
                    "[Featherweight] %s of packed weights are not cached in %s: its limit is %s"
                    " (%s).", size_text(size), entry.parent, size_text(_limit()), LIMIT)
                return
            self.writer = self.stack.enter_context(safetensors_writer(entry, tensors, {}))
            self.is_written = True
        except (WriteError, OSError) as error:
            log.warning("[Featherweight] The packed weights are not cached: %s", error)

    def write(self, name: str, weight: PackedTensor):
        """Writes a packed weight."""
        if not self.is_written:
            return
        try:
            for part, tensor in _parts_of(name, weight):
                tensor = tensor.cpu()
                self.writer.write(part, "U8" if tensor.dtype == torch.uint8 else "F32", [tensor])
                self.sums[part] = _sum_of(tensor)
        except WriteError as error:
            self.give_up(error)

    def write_sums(self):
        """Writes the sums of all tensors, when these are written."""
        if self.is_written:
            sums = torch.tensor([self.sums[part] for part in sorted(self.sums)],
                                dtype=torch.int64)
            self.writer.write(SUMS, "U8", [sums.view(torch.uint8)])

    def give_up(self, reason: str | WriteError):
        """Removes what was written so far, and logs the reason."""
        if not self.is_written:
            return
        self.is_written = False
        log.warning("[Featherweight] The packed weights are not cached: %s", reason)
        error = reason if isinstance(reason, WriteError) else WriteError(reason)
        with contextlib.suppress(WriteError):
            self.stack.__exit__(WriteError, error, error.__traceback__)


def _all_parts(types: PackedTypes,
               with_sums: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the tensors of an entry: name -> (shape, type)."""
    parts = {}
    for name, (type_name, shape) in types.items():
        packed, values = FORMATS[type_name], math.prod(shape)
        parts[name] = (-(-values * packed.block_bytes // packed.block_length),), "U8"
        if packed.qparams:
            parts[f"{name}.scale"] = (-(-values // packed.block_length),), "F32"
    if with_sums:
        parts[SUMS] = (8 * len(parts),), "U8"
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
    """Removes entries until `size` more bytes are within the limit.

    Args:
        folder: folder of the cache.
        size: bytes needed.
        keep: an entry that is not removed.

    Returns:
        Whether they are within the limit.
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
    total = sum(nbytes for _, nbytes, _ in entries)
    for _, nbytes, path in sorted(entries):
        if total + size <= _limit():
            break
        if path != keep and path.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # Windows does not remove a file that is in use
                path.unlink()
                total -= nbytes
                _last_use(path).unlink()
    return total + size <= _limit()
