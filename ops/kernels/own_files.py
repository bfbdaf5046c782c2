"""Files that nobody but this user can have written: native code is loaded from no others, and no verdict about it."""
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featherweight"


def is_private(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is there, is no symlink, belongs to this user and can be written by nobody else.

    is_kind: `stat.S_ISREG` or `stat.S_ISDIR`. A file counts only in a folder that is private too. On Windows, where a user's
    folder is so by itself, the first two are looked at.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not hasattr(os, "geteuid"):
        return is_kind(found.st_mode)
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def not_private(folder: Path) -> Path | None:
    """The folder or its parent, where that is not private; None where both are, made if need be. Raises OSError."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for part in (folder.parent, folder):
        try:
            part.mkdir(mode=0o700)
        except FileExistsError:
            if not part.is_dir():
                raise
        if not is_private(part, stat.S_ISDIR):
            return part
    return None


def private_folder(folder: Path) -> Path:
    """This folder, made if need be. Where it or its parent is not private, a new one for as long as the process runs.

    Raises OSError where nothing can be made.
    """
    part = not_private(folder)
    return folder if part is None else Path(_temporary_folder(part).name)


@functools.cache
def _temporary_folder(instead_of: Path) -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    log.warning("[Featherweight] %s is a link, belongs to another user or can be written by others, so compiled kernels are not"
                " kept there and are compiled anew at each start: remove it.", instead_of)
    return tempfile.TemporaryDirectory(prefix="featherweight-")
