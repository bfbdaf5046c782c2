"""Runs a command on a CPU with fewer instruction sets: python -m devtools.limited_cpu avx2 COMMAND.

They are hidden from every library and compiler in the command's processes: CPUID is answered by
`limited_cpu.c`. oneDNN's and torch's own variables limit these two alone; OpenVINO takes none.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
# name -> a flag of /proc/cpuinfo that the CPU needs for it
LIMITS = {"avx2": "avx2", "avx512_bf16": "avx512_bf16"}


def why_not(limit: str) -> str:
    """Returns why this machine's CPU cannot be limited so, or "" where it can."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    if sys.platform != "linux" or "cpuid_fault" not in flags:
        return "only Linux on a CPU with CPUID faulting, as Intel's have, can limit it"
    if LIMITS[limit] not in flags:
        return f"the CPU has no {LIMITS[limit]}"
    return "" if shutil.which("gcc") else "gcc is missing"


@contextlib.contextmanager
def environment(limit: str) -> Iterator[dict[str, str]]:
    """Yields the environment variables of a process with a limited CPU and a cache of its own.

    Args:
        limit: one of `LIMITS`, for which `why_not` is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limited_cpu.so")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
        yield {**os.environ, "LIMITED_CPU": limit, "LD_PRELOAD": str(library),
               "XDG_CACHE_HOME": folder}  # kernels are compiled for the CPU


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in LIMITS:
        sys.exit(__doc__)
    if reason := why_not(sys.argv[1]):
        sys.exit(f"Failed: {reason}")
    with environment(sys.argv[1]) as variables:
        sys.exit(subprocess.call(sys.argv[2:], env=variables))
