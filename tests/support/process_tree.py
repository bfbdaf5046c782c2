"""Processes that something has started, any of which may end while it is asked or waited for."""
import contextlib
from pathlib import Path

import psutil


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


def wait_for_users_of(folder: Path, seconds: float = 30):
    """Wait until no process has a folder's path in its environment or its command line."""
    path, users = str(folder), []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if path in " ".join([*each.cmdline(), *each.environ().values()]):
                users.append(each)
    psutil.wait_procs(users, seconds)
