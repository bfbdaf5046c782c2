"""What memory some work takes in a process of its own, as JSON. Linux only."""
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from devtools import ROOT


def probed(kind: str, path: Path, script: str) -> dict:
    """Returns what a script measures with a file on the CPU.

    Args:
        kind: one of the script's, "-" and its argument.
        path: of the file.
        script: that calls `run` with its own kinds.
    """
    variables = {**os.environ, "HOST_ARGUMENTS": "--cpu", "PYTHONPATH": str(ROOT)}
    probe = subprocess.run([sys.executable, script, kind, str(path)], text=True,
                           capture_output=True, env=variables)
    if probe.returncode:
        raise RuntimeError(f"The memory probe failed with {path.name}:\n{probe.stderr[-2000:]}")
    return json.loads(probe.stdout.splitlines()[-1])


def run(probes: Mapping):
    """Prints what a probe of a kind finds, as JSON; kind and file are this process's arguments."""
    kind, *arguments = sys.argv[1].split("-", 1)
    print(json.dumps(probes[kind](sys.argv[2], *arguments)))


def status(field: str) -> int:
    """Bytes of one field of this process: VmHWM (peak), VmRSS (now), RssAnon (now, without file
    pages)."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024
