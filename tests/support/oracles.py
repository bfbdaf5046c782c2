"""Packages that only heavy tests compare with, each in a folder of its own."""
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

FOLDER = Path(__file__).parents[2] / ".dev" / "oracles"


def installed(*requirements: str, complete: bool = False) -> Path:
    """The folder that holds these packages, `complete` with what they need; skips the test where
    the package index cannot be reached."""
    folder = FOLDER / requirements[0]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet",
                       *([] if complete else ["--no-deps"]), "--target", f"{folder}.new",
                       *requirements]
            if subprocess.run(command).returncode:
                pytest.skip("the package index cannot be reached")
            Path(f"{folder}.new").rename(folder)
    return folder
