"""What Windows refuses, refused on Linux: the pack may not remove, rename, replace or cut a file
that this process has open or mapped."""
import contextlib
import os
import sys
from pathlib import Path

from featherweight.loaders.files import atomic_file

PACK = Path(atomic_file.__file__).parents[2]
LIBRARY = (os.path.dirname(os.__file__) + "/", "<frozen")
OWN = tuple(str(PACK / name) for name in ("loaders", "nodes", "ops", "cluster"))
# folders of tests in which it is refused
FOLDERS = ("tests/loaders/files", "tests/loaders/packing", "tests/node",
           "tests/test_file_faults.py")
# event of `sys.audit` -> positions of the files that may not be in use; a new name is one where it
# replaces a file
EVENTS = {"os.remove": (0,), "os.rename": (0, 1), "os.truncate": (0,)}
_is_on = False


@contextlib.contextmanager
def enforced():
    """Refuses what Windows does while the block runs."""
    global _is_on
    lock, atomic_file.fcntl = atomic_file.fcntl, None  # which Windows has not
    _is_on = True
    try:
        yield
    finally:
        _is_on = False
        atomic_file.fcntl = lock


def is_busy(path) -> bool:
    """Returns whether this process has a file open or mapped."""
    try:
        path = os.path.realpath(path)
    except (TypeError, ValueError):
        return False
    if not os.path.isfile(path):
        return False
    status = os.stat(path)
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/self/fd/{descriptor}"), status):
                return True
    return f" {path}\n" in Path("/proc/self/maps").read_text(errors="surrogateescape")


def _is_of_the_pack() -> bool:
    """Returns whether the first function outside Python's library that makes this call is ours."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(OWN)


def _refuse(event: str, arguments: tuple):
    if not _is_on:
        return
    if event in EVENTS:
        paths = [arguments[position] for position in EVENTS[event]]
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_TRUNC:
        paths = arguments[:1]
    else:
        return
    for path in paths:
        if is_busy(path) and _is_of_the_pack():
            raise PermissionError(13, "in use, as on Windows", os.fspath(path))


if sys.platform == "linux":
    sys.addaudithook(_refuse)
