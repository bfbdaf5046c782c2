"""Files that only this user can have written: native code, and verdicts on it, are loaded from no
others."""
import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..log import log


def cache_folder() -> Path:
    """Returns the pack's folder in the user's cache, or a folder of this process where the user has
    no home folder."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "featherweight"
    try:
        return Path.home() / ".cache" / "featherweight"
    except RuntimeError as error:  # a container's user without HOME and without a name
        return _temporary_substitute("~/.cache/featherweight", str(error)) / "featherweight"


def is_private(path: Path, is_type: Callable[[int], bool]) -> bool:
    """Returns whether only this user can have written a file or folder.

    It must exist, be no symlink, belong to this user and be writable by nobody else. It does not
    look at a file's folder: callers check that as well. On Windows, where a user's folder is
    private anyway, only the first two are checked.

    Args:
        path: The file or folder.
        is_type: `stat.S_ISREG` or `stat.S_ISDIR`.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not is_type(status.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def private_folder(folder: Path) -> Path:
    """Creates a folder if need be and returns it, or a folder of this process where it cannot be
    created, or where it or its parent is not private.

    Raises:
        OSError: No folder can be created.
    """
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, exist_ok=True)
            if not is_private(part, stat.S_ISDIR):
                _warn_not_private(part)
                return temporary_folder(None)
    except OSError as error:
        return _temporary_substitute(str(folder), str(error))
    return folder


@functools.cache
def temporary_folder(parent: str | None) -> Path:
    """Returns a folder of this process, which is removed when it ends.

    Args:
        parent: Where to create it; None: where temporary files are.
    """
    # Windows removes no library that is loaded.
    folder = tempfile.TemporaryDirectory(prefix="featherweight-", dir=parent,
                                         ignore_cleanup_errors=True)
    _temporary_folders.append(folder)
    return Path(folder.name)


_temporary_folders: list[tempfile.TemporaryDirectory] = []


@functools.cache
def _temporary_substitute(folder: str, reason: str) -> Path:
    log.info(
        "%s cannot be used (%s), so kernels are kept only until ComfyUI ends. The"
        " environment variable XDG_CACHE_HOME names another folder.", folder, reason)
    return temporary_folder(None)


@functools.cache
def _warn_not_private(part: Path):
    log.warning(
        "%s is a link, belongs to another user or can be written by others, so"
        " compiled kernels are not kept there and are compiled again at each start: remove it.",
        part)


def kept(folder: Path, name: str, suffix: str) -> Path | None:
    """Returns what `keep` has kept under a name, None where it is missing or damaged: native code
    that is damaged would end the process."""
    for path in folder.glob(f"{name}-*{suffix}"):
        is_own = is_private(path, stat.S_ISREG)
        if is_own and path == _kept_path(folder, name, suffix, path):
            return path
        if is_own:
            log.info("The compiled kernel %s is damaged and is compiled again.", path)
        path.unlink(missing_ok=True)
    return None


def keep(folder: Path, name: str, suffix: str, written: Path) -> Path:
    """Keeps a file in a private folder, and returns its path, which has the digest of its bytes.

    Args:
        folder: Where it is kept.
        name: By which `kept` finds it.
        suffix: Of the path.
        written: The file, in that folder or below; it is moved.
    """
    path = _kept_path(folder, name, suffix, written)
    if not path.exists():  # Windows replaces no library that another process has loaded
        replace_durably(written, path)  # in one step: another process may load it meanwhile
    return path


def _kept_path(folder: Path, name: str, suffix: str, file: Path) -> Path:
    return folder / f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}{suffix}"


def remove_oldest(folder: Path, suffix: str, count: int):
    """Removes the oldest files of a folder that are more than `count`."""
    files = [(path.stat().st_mtime, path) for path in folder.glob(f"*{suffix}")]
    for _, path in sorted(files)[:max(0, len(files) - count)]:
        with contextlib.suppress(PermissionError):  # of Windows, where a process has loaded it
            path.unlink(missing_ok=True)


def replace_durably(written: str | os.PathLike, path: Path):
    """Renames a file so that after a loss of power either the old or the new file is there, whole.

    Args:
        written: The new file.
        path: The name it gets; an existing file is replaced.
    """
    with open(written, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
