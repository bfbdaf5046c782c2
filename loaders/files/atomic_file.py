"""Files that appear under their name whole, or not at all: what every writer of this folder stands
on.

The bytes go to `NAME.PID.featherweight.part` in the same folder and get their name when all of them
are on the disk. Whatever ends a writer in between (an error, a cancel, a full disk) takes the
temporary file with it. A killed process leaves it, and the next writer into that folder removes it:
its lock is gone. A writer holds that lock until the file has its name.
"""
import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil
import torch

from ..sizes import size_text

try:
    import fcntl
except ImportError:  # Windows, which neither removes nor renames a file that is open
    fcntl = None

SPARE = 64 << 20  # bytes left free on the disk, for all else that is being written
PART = re.compile(r".+\.(\d+)\.featherweight\.part")  # those of other programs are none of ours
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class WriteError(ValueError):
    """A file that cannot be written. The message names the file, what is in the way and what to
    do."""


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike, nbytes: int,
                  overwrite: bool = False) -> Iterator[BinaryIO]:
    """An open file, unbuffered, that becomes `path` when the block ends well.

    nbytes: what the file will take at most; as much is set aside now, so that a full disk is an
    error before the work. The file ends where it was written last. Raises WriteError where that
    cannot be, and for a `path` that exists, unless `overwrite`.
    """
    path = Path(path)
    check_writable(path, nbytes, overwrite)
    remove_stale_parts(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}.featherweight.part")
    with _explain_oserror(path):
        file = _open_locked(part)
    try:
        with _explain_oserror(path):
            _preallocate(file, nbytes)
        yield _FriendlyFile(file, path)
        with _explain_oserror(path):
            file.truncate(max(file.tell(), 0))
            os.fsync(file.fileno())
            if not overwrite and path.exists():
                raise WriteError(
                    f"{path} has come to be while it was written here, and stays as it is. Pick"
                    " another name."
                )
            if fcntl is None:
                file.close()
            os.replace(part, path)
    except BaseException:
        file.close()
        part.unlink(missing_ok=True)
        raise
    file.close()  # and with it its lock
    _sync_folder(path.parent)


@contextlib.contextmanager
def new_weights(path: str | os.PathLike, writer: type["WeightsWriter"], layout,
                overwrite: bool = False) -> Iterator["WeightsWriter"]:
    """A file that is there when the block ends well, with every tensor written in it, and otherwise
    not at all.

    layout: what the file will hold: `tensors` by name, the bytes of the whole file in `size`, and
    where the data starts in `start`; `header(written)` gives what stands before that. Raises
    WriteError, as `atomic_writer`.
    """
    with atomic_writer(path, layout.size, overwrite) as file:
        open_writer = writer(file, layout)
        yield open_writer
        open_writer.finish()


class WeightsWriter:
    """Takes the tensors of a file in their order, and puts the header before them when all is known
    that stands in it.

    written: of each tensor that the file has, what the layout's header tells of it.
    """

    def __init__(self, file, layout):
        self.file, self.layout, self.written = file, layout, {}
        self.file.seek(layout.start)

    def put(self, data: torch.Tensor) -> int:
        """Writes a tensor on the CPU where the last one ended. Returns its bytes."""
        return (
            self.file.write(data.contiguous().reshape(-1).view(torch.uint8).numpy())
            if data.numel()
            else 0
        )

    def finish(self):
        missing = self.layout.tensors.keys() - self.written.keys()
        if missing:
            raise ValueError(f"{min(missing)} was not written.")
        end = self.file.tell()
        self.file.seek(0)
        self.file.write(self.layout.header(self.written))
        self.file.seek(end)


def check_writable(path: str | os.PathLike, nbytes: int, overwrite: bool = False):
    """Raise WriteError where a file of `nbytes` could not be written at `path`: before any work is
    done for it."""
    path = Path(path)
    if path.is_dir():
        raise WriteError(f"{path} is a folder. Give the name of a file.")
    if path.exists() and not overwrite:
        raise WriteError(f"{path} exists. Pick another name, or ask for it to be overwritten.")
    if not path.parent.is_dir():
        raise WriteError(f"The folder {path.parent} does not exist. Make it, or pick another one.")
    if not os.access(path.parent, os.W_OK):
        raise WriteError(
            f"The folder {path.parent} may not be written to by this user. Pick another one, or"
            " change its permissions.")
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + SPARE:
        raise WriteError(
            f"{path.name} takes {size_text(nbytes, 2)}, the drive of {path.parent} has"
            f" {size_text(free, 2)} free. Make room, or pick a folder on another drive or a"
            " smaller type.")


class _FriendlyFile:
    """A file whose errors say in a sentence what happened to which file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path

    def write(self, data) -> int:
        """All of `data`, a buffer of bytes. Returns its length."""
        left = memoryview(data).cast("B")
        length = len(left)
        with _explain_oserror(self._path):
            while left:
                left = left[self._file.write(left):]  # the system takes at most 2 GB at a time
        return length

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def _explain_oserror(path: Path):
    """Errors of the system inside this block as a WriteError about `path`."""
    try:
        yield
    except OSError as error:
        advice = (
            "Make room, or pick another drive"
            if error.errno in FULL
            else "Check the drive and its permissions"
        )
        raise WriteError(
            f"{path} cannot be written ({error.strerror}). {advice}; nothing is left of it."
        ) from error


def _open_locked(part: Path) -> BinaryIO:
    """Return a new file that is open, and locked for as long as it is.

    Where a drive knows no locks, it is never found stale.
    """
    while True:
        file = open(part, "xb", buffering=0)  # noqa: SIM115  the caller closes it
        if fcntl is None:
            return file
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # waits for a cleaner that was faster
        if _has_name(file, part):
            return file
        file.close()  # that cleaner has removed it


def _has_name(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is the one of this name."""
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
        if error.errno in FULL:
            raise  # other drives do not know how


def remove_stale_parts(folder: Path):
    """Remove what killed writers have left in a folder: parts that nobody holds."""
    for part in folder.glob("*.part"):
        if match := PART.fullmatch(part.name):
            with contextlib.suppress(OSError):  # held, or gone already
                _remove_stale_part(part, int(match[1]))


def _remove_stale_part(part: Path, writer: int):
    """Remove a part unless its writer holds it. Raises OSError.

    Where there are no locks, a writer has to close its part before it can give it its name; so all
    of a living one's stay.

    Args:
        part: the file.
        writer: number of the process that made it.
    """
    if fcntl is None:
        if writer == os.getpid() or not psutil.pid_exists(writer):
            part.unlink()
        return
    with open(part, "r+b") as file:  # drives that emulate this lock lock only what may be written
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # else its writer was done before the lock, and the name is a later writer's
        if _has_name(file, part):
            part.unlink()


def _sync_folder(folder: Path):
    """Let the new name be on the disk too."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):  # some drives cannot
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
