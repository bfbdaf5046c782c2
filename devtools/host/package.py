"""Which files the registry's package holds, by the rule of `comfy node pack`."""
import subprocess

from devtools import ROOT


def packed_files() -> list[str]:
    """Files that git tracks and .comfyignore, written like a .gitignore, does not name; paths from
    the root."""
    listed = [
        _git("ls-files", "-z"),
        _git("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore")
    ]
    tracked, left_out = (output.split("\0")[:-1] for output in listed)
    return sorted(set(tracked) - set(left_out))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
