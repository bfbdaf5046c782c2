"""Which files the registry's package holds, by the rule of `comfy node pack`."""
import shutil
import subprocess
from pathlib import Path

from devtools import ROOT

FOLDER = "featherweight"  # in which it is unpacked: the project's name


def packed_files() -> list[str]:
    """Files that git tracks and .comfyignore, written like a .gitignore, does not name; paths from
    the root."""
    listed = [
        _git("ls-files", "-z"),
        _git("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore")
    ]
    tracked, left_out = (output.split("\0")[:-1] for output in listed)
    return sorted(set(tracked) - set(left_out))


def unpack(base: Path):
    """Put the package into the custom_nodes of a ComfyUI's base folder."""
    for path in packed_files():
        target = base / "custom_nodes" / FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
