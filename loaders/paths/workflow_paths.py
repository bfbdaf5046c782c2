"""Paths as workflows hold them: Windows separators, drives, and ways out of a folder."""
import os
import re


def use_slashes(name: str) -> str:
    """Returns a name with "/" between its folders, as a workflow made on Windows has not."""
    return name.replace("\\", "/")


def is_unsafe_name(name: str) -> bool:
    """Returns whether a name begins with a Windows drive or share, or is not possible for a file.

    Any other root at its beginning is dropped later.
    """
    try:
        return bool(re.match(r"[A-Za-z]:|[\\/]{2}", name)) or b"\0" in os.fsencode(name)
    except UnicodeEncodeError:
        return True


# what Windows allows in no name of a file or folder
NOT_ON_WINDOWS = re.compile(
    r'[<>:"|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def is_inside(path: str, folder: str) -> bool:
    """Returns whether a path without '..' lies in a folder, as written or with links resolved.

    So links inside the folder may lead out of it: the owner of this machine has made them, since no
    node of this pack makes links.
    """
    if ".." in re.split(r"[\\/]", path):
        return False
    for resolve in (os.path.abspath, os.path.realpath):
        start = os.path.normcase(os.path.join(resolve(folder), ""))
        if os.path.normcase(resolve(path)).startswith(start):
            return True
    return False
