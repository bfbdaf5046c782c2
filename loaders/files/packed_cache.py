"""What was packed while loading, kept for the next time: a safetensors file for each model, in a
folder under a limit.

Off until the environment names a folder (`FEATHERWEIGHT_PACKED_CACHE`). An entry is found by what
it was made of: the files with their sizes and times, the type of each weight, and the version of
the packers. The least recently used go first: the time of an empty file beside an entry says when
it was last read. Nothing else in the folder is touched, and whatever is wrong with it, the model
loads without it.

| in an entry | content |
|---|---|
| `X` | U8, the blocks of the weight X |
| `X.scale` | F32, its scales, where the format keeps them apart |
"""
import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...ops.format import FORMATS
from ...ops.packed_layout import packed_tensor, packed_tensors
from ..sizes import size_text
from .atomic_file import WriteError, remove_stale_parts
from .container import FileState, WeightFile, WeightFileError
from .safetensors import SafetensorsFile
from .safetensors_writer import file_size, safetensors_writer

log = logging.getLogger(__name__)

FOLDER, LIMIT = "FEATHERWEIGHT_PACKED_CACHE", "FEATHERWEIGHT_PACKED_CACHE_GB"
LIMIT_GB = 50.0  # where the environment gives no limit
PACKERS = 3  # to be raised when the packers make other bytes of the same weights
NAMES = "featherweight-*.safetensors"

# Name of a weight -> the format it is packed to, and its logical shape.
Wanted = Mapping[str, tuple[str, tuple[int, ...]]]


def is_on() -> bool:
    return bool(os.environ.get(FOLDER))


def entry_path(file: WeightFile, wanted: Wanted) -> Path | None:
    """Where these weights of a file are kept once they are packed; None where nothing is kept."""
    if not is_on() or not wanted:
        return None
    files = [(str(path.resolve()), state.identity) for path, state in zip(file.paths, file.states)]
    recipe = [PACKERS, files, sorted(wanted.items())]
    return Path(os.environ[FOLDER]) / NAMES.replace(
        "*", hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:40]
    )


def read(entry: Path | None, wanted: Wanted) -> dict[str, torch.Tensor] | None:
    """The packed weights of an entry, mapped from its file; None where there is none, or one that
    is damaged."""
    if entry is None or not entry.is_file():
        return None
    try:
        file = SafetensorsFile(entry, [entry])
        for part, expected in _all_parts(wanted).items():
            entry_of_part = file.entries[part]
            if (entry_of_part.shape, entry_of_part.format) != expected:
                raise ValueError(
                    f"{part} is {entry_of_part.format} {entry_of_part.shape}, expected {expected}")
        weights = {
            name: _packed(file, name, type_name, shape)
            for name, (type_name, shape) in wanted.items()
        }
        # another user's, or on a drive that is only read: it is as good as any
        with contextlib.suppress(OSError):
            _used(entry).touch()  # not the entry itself, which others have mapped and watch
    except (WeightFileError, KeyError, ValueError, OSError) as error:
        log.warning("[Featherweight] What was kept in %s cannot be used (%s) and is made anew.",
                    entry, error)
        with contextlib.suppress(OSError):
            entry.unlink()
        return None
    return weights


def _used(entry: Path) -> Path:
    return entry.with_suffix(".used")


def _packed(file: SafetensorsFile, name: str, type_name: str, shape: tuple[int,
                                                                           ...]) -> torch.Tensor:
    scale = file.tensor(f"{name}.scale") if FORMATS[type_name].scales_apart else None
    return packed_tensor(FORMATS[type_name], file.tensor(name), shape, scale=scale)


@contextlib.contextmanager
def entry_writer(entry: Path | None, wanted: Wanted) -> Iterator["EntryWriter"]:
    """What takes the packed weights one by one; they are an entry when the block ends well, all of
    them being there.

    entry: None: nothing is kept.
    """
    writer = EntryWriter(entry, wanted)
    try:
        with writer.stack:
            yield writer
    except WriteError as error:  # such as: another process has kept the same in the meantime
        writer.is_written = False
        log.warning("[Featherweight] What was packed is not kept: %s", error)
    if writer.is_written:
        # another process may have filled it at the same time
        _make_room(entry.parent, 0, but=entry)


class EntryWriter:
    """Writes an entry, or gives up on it where it cannot be written. is_written: whether it is
    being kept."""

    def __init__(self, entry: Path | None, wanted: Wanted):
        self.stack = contextlib.ExitStack()
        self.is_written = False
        if entry is None:
            return
        tensors = _all_parts(wanted)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            size = file_size(tensors, {})
            if not _make_room(entry.parent, size):
                log.warning("[Featherweight] %s are not kept in %s: its limit is %s (%s).",
                            size_text(size), entry.parent, size_text(_limit()), LIMIT)
                return
            self.writer = self.stack.enter_context(safetensors_writer(entry, tensors, {}))
            self.is_written = True
        except (WriteError, OSError) as error:
            log.warning("[Featherweight] What is packed is not kept: %s", error)

    def write(self, name: str, weight: torch.Tensor):
        """Keep a packed weight."""
        if not self.is_written:
            return
        try:
            for part, tensor in zip((name, f"{name}.scale"), packed_tensors(weight)):
                self.writer.write(part, "U8" if tensor.dtype == torch.uint8 else "F32",
                                  [tensor.cpu()])
        except WriteError as error:
            self.give_up(error)

    def give_up(self, why: str | WriteError):
        """Remove what was written so far."""
        if not self.is_written:
            return
        self.is_written = False
        log.warning("[Featherweight] What is packed is not kept: %s", why)
        error = why if isinstance(why, WriteError) else WriteError(why)
        with contextlib.suppress(WriteError):
            self.stack.__exit__(WriteError, error, error.__traceback__)


def _all_parts(wanted: Wanted) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of an entry: name -> (shape, type)."""
    parts = {}
    for name, (type_name, shape) in wanted.items():
        packed, values = FORMATS[type_name], math.prod(shape)
        parts[name] = (-(-values * packed.block_bytes // packed.block_length),), "U8"
        if packed.scales_apart:
            parts[f"{name}.scale"] = (-(-values // packed.block_length),), "F32"
    return parts


def _limit() -> float:
    """Bytes that all entries may take together."""
    text = os.environ.get(LIMIT, "")
    try:
        return float(text or LIMIT_GB) * 1e9
    except ValueError:
        log.warning("[Featherweight] %s is %r, no number of GB; %g is taken.", LIMIT, text,
                    LIMIT_GB)
        return LIMIT_GB * 1e9


def _make_room(folder: Path, size: int, but: Path | None = None) -> bool:
    """Remove entries until `size` bytes more are within the limit. Returns whether they are. but:
    an entry that stays."""
    if size > _limit():
        return False
    remove_stale_parts(folder)
    entries = []
    for path in (*folder.glob(NAMES), *folder.glob(f"{NAMES}.*.part")):
        with contextlib.suppress(OSError):  # another process may have removed it
            status, used = path.stat(), FileState.of(_used(path))
            entries.append((max(status.st_mtime_ns,
                                used.time if used else 0), status.st_size, path))
    left = sum(nbytes for _, nbytes, _ in entries)
    for _, nbytes, path in sorted(entries):
        if left + size <= _limit():
            break
        if path != but and path.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # Windows does not remove a file that is in use
                path.unlink()
                left -= nbytes
                _used(path).unlink()
    return left + size <= _limit()
