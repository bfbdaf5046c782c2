"""The versions of ComfyUI that this version of the pack was tested on, and what to say of others.

Standard library only: it is imported before anything of ComfyUI.
"""
import re

VERSION = "0.2.3"  # of this pack, as pyproject.toml has it
OLDEST_HOST, NEWEST_HOST = "0.24.0", "0.33.0"  # the ends of what `dev.py matrix` runs
UPDATES = "https://github.com/featherweight/ComfyUI-Featherweight/releases"

try:
    import comfyui_version

    HOST_VERSION = comfyui_version.__version__
except (ImportError, AttributeError):  # the oldest versions do not have it
    HOST_VERSION = "of an unknown version"


def is_older(version: str, other: str) -> bool:
    """Returns whether one version of ComfyUI came before another, as "0.9.12" before "0.24.0"."""
    return _numbers(version) < _numbers(other)


def is_untested(version: str) -> bool:
    """Returns whether a version is newer than all that were tested, patches of the last aside."""
    return _numbers(version)[:2] > _numbers(NEWEST_HOST)[:2]


def tested_range() -> str:
    """Returns the tested versions as part of a sentence."""
    return f"Featherweight {VERSION} was tested on ComfyUI {OLDEST_HOST} to {NEWEST_HOST}"


def where_to_update() -> str:
    """Returns a sentence that says where a newer version of this pack may be."""
    return f"Look for an update of Featherweight in ComfyUI Manager or at {UPDATES}."


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
