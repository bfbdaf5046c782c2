"""Compiles the libraries of the fake GPUs, once for each source, torch and compiler, in ten
seconds. They are kept in .dev."""
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from devtools import ROOT

SOURCE = Path(__file__).with_name("source")
KEPT = ROOT / ".dev" / "fakegpu"
COMPILERS = ("c++", "g++")  # after the environment variable CXX
# aimdo writes into the beginnings of functions, so none may be a mere jump to another.
DRIVER = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-optimize-sibling-calls",
    "-Wl,-soname,libcuda.so.1",
)
DEVICE = (
    "-std=c++20",
    "-O0",
    "-fPIC",
    "-shared",
    "-w",
    "-DAT_PER_OPERATOR_HEADERS",
    "-Wl,-rpath,$ORIGIN",
)


class NoFakeGpus(Exception):
    """There are none on this machine: why, in one sentence."""


@functools.cache
def why_not() -> str:
    """Why this machine has no fake GPUs, or "" where it has. Builds them."""
    try:
        libraries()
        return ""
    except NoFakeGpus as error:
        return str(error)


@functools.cache
def libraries() -> Path:
    """The folder with the libraries, built if need be, by one process at a time. Raises
    NoFakeGpus."""
    if sys.platform != "linux":
        raise NoFakeGpus("fake GPUs are built on Linux only")
    if any(_torch().glob("lib/libc10_*.so")):  # of CUDA, ROCm or XPU
        raise NoFakeGpus("fake GPUs need a torch that was built for CPUs")
    compiler = next(
        filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        raise NoFakeGpus("fake GPUs need a C++ compiler, and there is none")
    folder = KEPT / _digest(compiler)
    KEPT.mkdir(parents=True, exist_ok=True)
    import fcntl  # Linux only, as all of this

    with open(KEPT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building them: theirs will do
        if not folder.is_dir():
            _build(compiler, folder)
    return folder


def _build(compiler: str, folder: Path):
    torch = _torch()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        driver, device = made / "libcuda.so.1", made / "libfakegpu.so"
        _compile(compiler, *DRIVER, "devices.cpp", "driver.cpp", "-o", driver)
        _compile(compiler, *DEVICE, f"-I{torch / 'include'}", "streams.cpp", "torch_device.cpp",
                 "torch_operators.cpp", "-o", device, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
                 driver)
        made.rename(folder)


def _compile(*command):
    made = subprocess.run([str(part) for part in command], cwd=SOURCE, capture_output=True,
                          text=True)
    if made.returncode:
        error = next((line for line in made.stderr.splitlines() if "error" in line),
                     made.stderr[:200])
        raise NoFakeGpus(f"fake GPUs could not be compiled for torch {version('torch')}: {error}")


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent


def _digest(compiler: str) -> str:
    parts = [
        version("torch"), sys.version,
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout, *DRIVER,
        *DEVICE, *(path.read_text() for path in sorted(SOURCE.iterdir()))
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
