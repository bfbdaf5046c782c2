"""Processes of tests: starts one, and looks at those that it started, which may end meanwhile."""
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# begins a program whose first argument is the folder of the pack
IMPORT_PACK = """
import sys, types
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
"""


def wait_until(condition: Callable[[], object], seconds: float = 600):
    """Wait until a condition holds, for long on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.05)


def names(process: psutil.Process) -> list[str]:
    """Return the names of the processes that it and those behind it have started."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(child.name())
    return found


def has(process: psutil.Process, name: str) -> bool:
    """Return whether one of `names` contains a name."""
    return any(name in each for each in names(process))


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses on which it and what it started wait for others."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {
                connection.laddr.ip for connection in each.net_connections()
                if connection.status == psutil.CONN_LISTEN
            }
    return {address.removeprefix("::ffff:") for address in found}


def wait_for_processes_using(folder: Path, seconds: float = 30):
    """Wait until no process has a folder's path in its environment or its command line."""
    path, processes = str(folder), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if path in " ".join([*process.cmdline(), *process.environ().values()]):
                processes.append(process)
    psutil.wait_procs(processes, seconds)


def start_interruptible(command: list[str], **options) -> subprocess.Popen:
    """Start a process that handles SIGINT and SIGHUP, also where the tests run in a shell's
    background or under `nohup`.

    Such a process ignores one of the signals, and passes that on to its children.
    """
    if os.name == "posix":
        def handle_signals():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

        options["preexec_fn"] = handle_signals
    return subprocess.Popen(command, **options)
