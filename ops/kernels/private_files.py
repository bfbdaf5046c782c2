"""Files that nobody but this user can have written: native code is loaded from no others, and no
verdict about it."""
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again; without a home, a folder of this
    process."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "featherweight"
    try:
        return Path.home() / ".cache" / "featherweight"
    except RuntimeError as error:  # a container's user without HOME and without a name
        return _instead_of("~/.cache/featherweight", str(error)) / "featherweight"


def is_private(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is there, is no symlink, belongs to this user and can be written by nobody else.

    is_kind: `stat.S_ISREG` or `stat.S_ISDIR`. A file counts only in a folder that is private too.
    On Windows, where a user's folder is so by itself, the first two are looked at.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not hasattr(os, "geteuid"):
        return is_kind(found.st_mode)
    return (
        is_kind(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def private_folder(folder: Path) -> Path:
    """This folder, made if need be. Where it cannot be made, or it or its parent is not private,
    one of this process.

    Raises OSError where nothing can be made.
    """
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, exist_ok=True)
            if not is_private(part, stat.S_ISDIR):
                _warn_of(part)
                return temporary_folder()
    except OSError as error:
        return _instead_of(str(folder), str(error))
    return folder


@functools.cache
def temporary_folder(parent: str | None = None) -> Path:
    """A folder of this process, removed when it ends. parent: where it lies, if not where temporary
    files do."""
    folder = tempfile.TemporaryDirectory(prefix="featherweight-", dir=parent)
    _temporary_folders.append(folder)
    return Path(folder.name)


_temporary_folders: list[tempfile.TemporaryDirectory] = []


@functools.cache
def _instead_of(folder: str, why: str) -> Path:
    log.info(
        "[Featherweight] %s cannot be used (%s), so kernels are kept only until ComfyUI ends. The"
        " environment variable XDG_CACHE_HOME names another folder.", folder, why)
    return temporary_folder()


@functools.cache
def _warn_of(part: Path):
    log.warning(
        "[Featherweight] %s is a link, belongs to another user or can be written by others, so"
        " compiled kernels are not kept there and are compiled again at each start: remove it.",
        part,
    )


def replace_durably(written: str | os.PathLike, path: Path):
    """Gives a file its name so that after a loss of power there is the new one or the old one,
    whole."""
    with open(written, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
