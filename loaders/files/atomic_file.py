"""Writes files atomically: a file appears under its name complete, or not at all.

The bytes go to `NAME.PID.featherweight.part` in the same folder, which is renamed when all of them
are on the disk. An error, a cancel or a full disk removes this temporary file. A killed process
leaves it behind without its lock, and the next writer into that folder removes it. A writer holds
the lock until the file has its name.
"""
import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch

from ...ops.stable_names import short_error_name
from ..byte_sizes import size_text

try:
    import fcntl
except ImportError:  # Windows, which neither removes nor renames a file that is open
    fcntl = None

SPARE = 64 << 20  # bytes left free on the disk for other programs
PART = re.compile(r".+\.(\d+)\.featherweight\.part")  # group 1: the writer's process id
IN_USE = ("is in use, by a model that ComfyUI has loaded from it or by another program, so it"
          " cannot be replaced. Pick another name, or unload models and close that program")
DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@short_error_name
class WriteError(ValueError):
    """A file cannot be written. The message names the file, the reason and what to do."""


Tensors = Mapping[str, tuple[Sequence[int], str]]  # name -> (logical shape, type)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike, nbytes: int,
                  overwrite: bool = False, mode: int = 0o666) -> Iterator["_FriendlyFile"]:
    """Opens an unbuffered file that becomes `path` when the block ends without an error.

    The file ends at its last position.

    Args:
        path: the file to write.
        nbytes: upper bound of its size, reserved now so that a full disk is an error before the
            work.
        overwrite: whether an existing file is replaced.
        mode: permissions of the file, from which the process's umask takes some.

    Raises:
        WriteError: the file cannot be written, or exists and `overwrite` is false.
    """
    path = Path(path)
    check_writable(path, nbytes, overwrite)
    part = path.with_name(f"{path.name}.{os.getpid()}.featherweight.part")
    file = None
    try:
        with _explain_oserror(path):
            file = _open_locked(part, mode)
            _preallocate(file, nbytes)
        yield _FriendlyFile(file, path)
        with _explain_oserror(path):
            file.truncate(max(file.tell(), 0))
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            (_replace if overwrite else _rename_to_new)(part, path)
    except BaseException as error:
        if file is not None:
            file.close()
        # Ctrl-C may come between the creation of the file and its name here
        if file is not None or isinstance(error, KeyboardInterrupt):
            part.unlink(missing_ok=True)
        raise
    file.close()  # releases the lock
    _sync_folder(path.parent)


class WeightsWriter:
    """Writes the tensors of a file in order, and the header when its content is known.

    Attributes:
        layout_class: makes the content of a file of tensors and metadata, see `open`: `tensors` by
            name, `size` in bytes, `start` of the data, and `header(written)`, the bytes before it.
        written: name of each tensor written so far -> its entry for the layout's header.
    """

    layout_class: Callable[[Mapping, Mapping], Any]

    @classmethod
    def file_size(cls, tensors: Tensors, metadata: Mapping[str, Any]) -> int:
        """Returns the bytes of a whole file with these tensors and metadata."""
        return cls.layout_class(tensors, metadata).size

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, Any],
             overwrite: bool = False, mode: int = 0o666) -> Iterator[Any]:
        """Opens a file that exists after the block only if every tensor was written.

        Args:
            path: the file to write.
            tensors: name -> (logical shape, planned type), in the order of writing.
            metadata: key -> value.
            overwrite, mode: as for `atomic_writer`.

        Raises:
            WriteError: the file cannot be written, or cannot hold these tensors.
        """
        layout = cls.layout_class(tensors, metadata)
        with atomic_writer(path, layout.size, overwrite, mode) as file:
            writer = cls(file, layout)
            yield writer
            writer.finish()

    def __init__(self, file: "_FriendlyFile", layout):
        self.file = file
        self.layout = layout
        self.written = {}
        self.file.seek(layout.start)

    def put(self, data: torch.Tensor) -> int:
        """Appends a tensor on the CPU. Returns its size in bytes."""
        if not data.numel():
            return 0
        return self.file.write(data.contiguous().reshape(-1).view(torch.uint8).numpy())

    def finish(self):
        """Writes the header. Raises ValueError if a tensor is missing."""
        missing = self.layout.tensors.keys() - self.written.keys()
        if missing:
            raise ValueError(f"{min(missing)} was not written.")
        end = self.file.tell()
        self.file.seek(0)
        self.file.write(self.layout.header(self.written))
        self.file.seek(end)


def check_writable(path: str | os.PathLike, nbytes: int, overwrite: bool = False):
    """Raises WriteError if a file of `nbytes` could not be written at `path`.

    What killed writers have left in its folder is removed first: it takes the space.
    """
    path = Path(path)
    if path.is_dir():
        raise WriteError(f"{path} is a folder. Give the name of a file.")
    if path.exists() and not overwrite:
        raise WriteError(f"{path} exists. Pick another name, or allow overwriting it.")
    if path.exists() and _is_in_use(path):
        raise WriteError(f"{path} {IN_USE}; nothing was written.")
    if not path.parent.is_dir():
        raise WriteError(f"The folder {path.parent} does not exist. Create it or pick another.")
    if not os.access(path.parent, os.W_OK):
        raise WriteError(
            f"The folder {path.parent} is not writable by this user. Pick another one, or change"
            " its permissions.")
    remove_stale_parts(path.parent)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + SPARE:
        raise WriteError(
            f"{path.name} takes {size_text(nbytes, 2)}, but the drive of {path.parent} has"
            f" {size_text(free, 2)} free. Free some space, or pick a folder on another drive or a"
            " smaller type.")


class _FriendlyFile:
    """A file that raises WriteError, with a message for people, in place of OSError."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file = file
        self._path = path

    def write(self, data) -> int:
        """Writes all of `data`, a buffer of bytes. Returns its length."""
        remaining = memoryview(data).cast("B")
        length = len(remaining)
        with _explain_oserror(self._path):
            while remaining:  # the system writes at most 2 GB at a time
                remaining = remaining[self._file.write(remaining):]
        return length

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def _explain_oserror(path: Path):
    """Turns an OSError inside the block into a WriteError about `path`."""
    try:
        yield
    except OSError as error:
        advice = (
            "Free some space, or pick another drive"
            if error.errno in DISK_FULL
            else "Check the drive and its permissions"
        )
        raise WriteError(
            f"{path} cannot be written ({error.strerror}). {advice}; no partial file was left."
        ) from error


def _open_locked(part: Path, mode: int) -> BinaryIO:
    """Creates a file of some permissions and locks it until it is closed.

    On a drive without locks it never counts as stale.
    """
    while True:
        file = open(part, "xb", buffering=0,  # noqa: SIM115  the caller closes it
                    opener=lambda path, flags: os.open(path, flags, mode))
        if fcntl is None:
            return file
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # waits for a cleaner that locked it first
        if _has_name(file, part):
            return file
        file.close()  # that cleaner has removed it


def _rename_to_new(part: Path, path: Path):
    """Renames a file, and raises WriteError if there is one of the new name already."""
    try:
        if os.name == "nt":
            os.rename(part, path)
            return
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a drive without links
            if path.exists():
                raise FileExistsError from None
            os.replace(part, path)
        else:
            os.unlink(part)
    except FileExistsError as error:
        raise WriteError(f"{path} was created by another program meanwhile and was not overwritten."
                         " Pick another name.") from error


def _is_in_use(path: Path) -> bool:
    """Returns whether a file cannot be replaced as a program has it open, as on Windows."""
    try:
        os.rename(path, path)
    except PermissionError:
        return True
    return False


def _replace(part: Path, path: Path):
    """Renames a finished file, to a free name where a file in use keeps its own.

    Raises:
        WriteError: it got another name, which the message tells.
        OSError
    """
    try:
        os.replace(part, path)
    except PermissionError as error:
        numbers = (path.with_stem(f"{path.stem} ({number})") for number in itertools.count(2))
        free = next(name for name in numbers if not name.exists())
        os.rename(part, free)
        raise WriteError(f"{path} {IN_USE}; the finished file is {free.name}.") from error


def _has_name(file: BinaryIO, path: Path) -> bool:
    """Returns whether `path` is this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _preallocate(file: BinaryIO, nbytes: int):
    if not hasattr(os, "posix_fallocate") or not nbytes:
        return
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise  # any other error: the drive does not support it


def remove_stale_parts(folder: Path):
    """Removes the temporary files that killed writers left in a folder."""
    for part in folder.glob("*.part"):
        if match := PART.fullmatch(part.name):
            with contextlib.suppress(OSError):  # locked, or removed already
                _remove_stale_part(part, int(match[1]))


def _remove_stale_part(part: Path, writer: int):
    """Removes a temporary file unless its writer holds the lock.

    Without locks, all files of a running process stay: a writer closes its file before it renames
    it.

    Args:
        part: the file.
        writer: id of the process that created it.

    Raises:
        OSError: it is locked, or cannot be removed.
    """
    if fcntl is None:
        if writer == os.getpid() or not psutil.pid_exists(writer):
            part.unlink()
        return
    with open(part, "r+b") as file:  # some drives emulate this lock on writable files only
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Otherwise its writer finished before the lock, and the name is a later writer's.
        if _has_name(file, part):
            part.unlink()


def _sync_folder(folder: Path):
    """Writes the folder's entry for the new name to the disk."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):  # some drives cannot
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
