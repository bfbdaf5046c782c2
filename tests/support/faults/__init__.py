"""Faults of the system, injected into every call on a file that this pack makes: `preload.cpp` and
the process that runs it."""
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ERRORS = {"full": errno.ENOSPC, "damaged": errno.EIO, "not permitted": errno.EACCES}


def compiled(folder: Path) -> Path:
    """What makes calls fail, for LD_PRELOAD."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("it takes Linux and a C++ compiler")
    built = folder / "faults.so"
    subprocess.run([
        compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", built, FOLDER / "preload.cpp",
        "-ldl"
    ], check=True)
    return built
