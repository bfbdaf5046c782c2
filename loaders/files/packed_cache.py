"""A cache on disk for models packed while loading: one file per model, which its caller writes.

It lies in ComfyUI's user folder and keeps what took longer than `MIN_SECONDS` to pack. The
environment (`FEATHERWEIGHT_PACKED_CACHE`) names another folder, where all is kept, or turns it off.
The key of an entry is what it was made of: the files with their sizes and times, what configs and
scales beside them say, the type of each weight, and the version of the packers. When the cache
reaches its limit, or the drive has little room, entries of earlier versions are removed, then the
least recently used ones; the time of an empty file `.used` is that of an entry's last use. Other
files in the folder are not touched. If an entry cannot be used, the model loads without it.
"""
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from ...ops.log import log
from ..byte_sizes import size_text
from ..container.weight_file import FileState, WeightFile, WeightFileError
from ..quantizers.sdnq import read_config
from ..refusals.read_anyway import reads_anyway
from .atomic_file import remove_stale_parts
from .scale_map import scale_map

FOLDER, LIMIT = "FEATHERWEIGHT_PACKED_CACHE", "FEATHERWEIGHT_PACKED_CACHE_GB"
OFF = "off"  # in place of a folder
LIMIT_GB = 50.0  # default
MIN_SECONDS = 60  # that packing took of what is kept where no folder is named
FREE_SHARE, MAX_FREE = 0.1, 20e9  # of a drive, and bytes of it: the smaller is left free,
NEARLY_FULL_SHARE = 0.1  # that an entry may take of the free bytes of a drive with less than that
PACKER_VERSION = 5  # raised when the packers make other bytes of the same weights
CURRENT = f"featherweight-{PACKER_VERSION}-"  # how the names of entries of this version begin
NAMES = ("featherweight-*.safetensors", "featherweight-*.gguf")

Entry = TypeVar("Entry")
# name of a weight -> (type, logical shape); the type is one of FORMATS, of ROW_TYPES or a plain one
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


def entry_path(file: WeightFile, types: PackedTypes, folder: Path | None, suffix: str,
               measurement: FileState | None = None) -> Path | None:
    """Returns the path of the entry for these weights of a file, None if they are not cached.

    Args:
        file: of the weights.
        types: of the weights that are packed.
        folder: of the cache.
        suffix: of the entry, ".safetensors" or ".gguf".
        measurement: by which they are rounded.
    """
    if folder is None or not types:
        return None
    files = [(str(path.resolve()), state.identity) for path, state in zip(file.paths, file.states)]
    scales = FileState.of(scale_map(file.path) or "")
    recipe: list = [PACKER_VERSION, files, sorted(types.items()), file.quantization,
                    read_config(file.path), scales and scales.identity, reads_anyway()]
    if measurement is not None:
        recipe.append(measurement)
    digest = hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:40]
    return folder / f"{CURRENT}{digest}{suffix}"


def read(entry: Path | None, read_entry: Callable[[Path], Entry]) -> Entry | None:
    """Returns what `read_entry` returns of an entry; None if it is missing or damaged.

    Args:
        entry: its path.
        read_entry: raises KeyError or ValueError for a damaged entry.
    """
    if entry is None or not entry.is_file():
        return None
    try:
        found = read_entry(entry)
        # The entry itself stays untouched: other processes map it and check its time.
        with contextlib.suppress(OSError):  # another user's entry, or a read-only drive
            _last_use(entry).touch()
        return found
    except (KeyError, ValueError, OSError) as error:
        # what a reader advises is for files of people
        reason = "it is damaged" if isinstance(error, WeightFileError) else str(error)
        log.warning(
            "The packed weights in %s cannot be used (%s), so they are packed"
            " again.", entry, reason)
    with contextlib.suppress(OSError):  # Windows: after the error, which keeps the file mapped
        entry.unlink()
    return None


def _last_use(entry: Path) -> Path:
    """Returns the empty file whose time is that of the entry's last use."""
    return entry.with_suffix(".used")


def keep(entry: Path | None, size: int, write_entry: Callable[[Path], object]) -> bool:
    """Writes an entry, whole or not at all; why it is not written is in the log.

    Args:
        entry: its path, None to write nothing.
        size: bytes that it takes at most.
        write_entry: writes it; raises ValueError where it cannot.

    Returns:
        Whether it is written.
    """
    if entry is None:
        return False
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        if not _free_space(entry.parent, size):
            log.warning(
                "%s of packed weights are not cached in %s: its limit is %s (%s),"
                " and some of the drive, which has %s free, is left free.", size_text(size),
                entry.parent, size_text(_limit()), LIMIT,
                size_text(shutil.disk_usage(entry.parent).free))
            return False
        write_entry(entry)
    except (ValueError, OSError) as error:  # another process may have written it meanwhile
        log.warning("The packed weights are not cached: %s", error)
        return False
    _free_space(entry.parent, 0, keep=entry)  # another process may have written others meanwhile
    return True


def _limit() -> float:
    """Returns the limit in bytes for all entries together."""
    text = os.environ.get(LIMIT, "")
    try:
        return float(text or LIMIT_GB) * 1e9
    except ValueError:
        log.warning("%s is %r, not a number of GB; using %g.", LIMIT, text,
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
    for path in _files(folder):
        with contextlib.suppress(OSError):  # another process may have removed it
            status, last_use = path.stat(), FileState.of(_last_use(path))
            time = max(status.st_mtime_ns, last_use.time if last_use else 0)
            entries.append((path.name.startswith(CURRENT), time, status.st_size, path))
    disk = shutil.disk_usage(folder)
    free = max(disk.free - min(MAX_FREE, disk.total * FREE_SHARE), disk.free * NEARLY_FULL_SHARE)
    total = sum(nbytes for *_, nbytes, _ in entries)
    removable = sum(nbytes for *_, nbytes, path in entries if path != keep)
    if size > free + removable:
        return False
    for *_, nbytes, path in sorted(entries):
        if total + size <= _limit() and size <= free:
            break
        if path != keep and path.suffix != ".part":
            with contextlib.suppress(OSError):  # Windows does not remove a file that is in use
                path.unlink()
                total -= nbytes
                free += nbytes
                _last_use(path).unlink()
    return total + size <= _limit() and size <= free


def _files(folder: Path) -> Iterator[Path]:
    """Yields the entries of a folder, and the parts of those that are being written."""
    for name in NAMES:
        yield from folder.glob(name)
        yield from folder.glob(f"{name}.*.part")
