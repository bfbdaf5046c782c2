"""Starts `trial` in a process of its own and hears what it says."""
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .background import ending
from .processes import end_process, start_process

START_SECONDS = 180  # that the process may take until it says something
ATTEMPT_SECONDS = 120  # that a kernel may take to be compiled, checked and timed
CPU_PATIENCE = 5  # times as long where its process counts that itself, and may be without the processor meanwhile
GRACE_SECONDS = 2  # between being told to end and being killed
LOOK_EVERY = 1.0  # seconds between two looks at whether the trial must stop
LOCK = "featherweight-trial.lock"
ASK_EVERY = 1.0  # seconds, while another process holds the lock

# How a trial ended by the signals that no kernel sends. A system without memory kills what takes much, whoever it is.
ENDED_BY = {getattr(signal, name): how for name, how in {
    "SIGPROF": ("hung", "it took all the work that it may"), "SIGALRM": ("late", "the trial took all the time that it may"),
    "SIGKILL": ("killed", "its process was killed"), "SIGTERM": ("failed", "its process was told to end"),
    "SIGHUP": ("failed", "its process was told to end")}.items() if hasattr(signal, name)}

PACK = Path(__file__).parents[2]
# The pack's folder has any name, an embedded Python looks for modules in no folder but its own, and the one it works in may
# hold anything.
START = ("import sys, types; sys.path[:] = filter(None, sys.path);"
         " pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]];"
         " sys.modules['featherweight'] = pack; from featherweight.ops.kernels import trial; trial.main()")
COMMAND = (sys.executable, "-c", START, str(PACK))


class Outcome(NamedTuple):
    """how: "ended", all was tried; "stopped", there was no room or no rest; "crashed", "hung", "killed" by another program,
    "late" or "failed". at: the backend and the text of what was being tried, if anything. why: in words."""
    how: str
    at: tuple[str, str] | None = None
    why: str = ""


def run_trial(job: dict, hear: Callable[[str, str, dict], None], seconds: float, is_busy: Callable[[], bool] = lambda: False,
              command=COMMAND, attempt_seconds: float = ATTEMPT_SECONDS) -> Outcome:
    """Runs a trial to its end. job: see `trial`, which hears `seconds` from here. hear(backend, text, verdict): called for each
    verdict when it comes. is_busy: asked now and then; the trial stops where it says yes. Raises OSError where no process can
    be started."""
    background = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)
    process = start_process(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            creationflags=background)
    try:
        lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), name="featherweight-trial", daemon=True).start()
        with contextlib.suppress(OSError):  # it is gone already, which its output says too
            limits = {"seconds": seconds + GRACE_SECONDS, "attempt_seconds": attempt_seconds}
            process.stdin.write(json.dumps(job | limits).encode() + b"\n")
            process.stdin.flush()
        counts_itself = job["device"] == "cpu" and hasattr(signal, "SIGPROF")
        return _follow(process, lines, hear, seconds, is_busy, attempt_seconds * (CPU_PATIENCE if counts_itself else 1))
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        end_process(process)


def _follow(process, lines: queue.SimpleQueue, hear, seconds: float, is_busy, attempt_seconds: float) -> Outcome:
    at, limit, heard = None, START_SECONDS, time.monotonic()
    end = heard + seconds
    while True:
        if is_busy():
            return Outcome("stopped", None, "the device is at work")
        try:
            line = lines.get(timeout=max(0, min(LOOK_EVERY, min(heard + limit, end) - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= end:
                return Outcome("late", at, f"the trial took more than {seconds:g} s")
            if time.monotonic() >= heard + limit:
                return Outcome("hung", at, f"it took more than {limit:g} s")
            continue
        limit, heard = attempt_seconds, time.monotonic()
        if line is None:
            break
        match line:
            case {"trying": [str(backend), str(text)]}:
                at = backend, text
            case {"stopped": why}:
                return Outcome("stopped", None, str(why))
            case {"failed": why}:
                return Outcome("crashed" if at else "failed", at, str(why))
            case {"backend": str(backend), "text": str(text), "verdict": dict(verdict)}:
                at = None
                hear(backend, text, verdict)
    status = process.wait()
    if ending.is_set():
        return Outcome("stopped", None, "this process ends")
    how, why = ENDED_BY.get(-status, ("crashed", f"its process ended with {status}"))
    return Outcome(how, at, why) if at or status else Outcome("ended")


def _read(stream, lines: queue.SimpleQueue):
    """Puts each line that is an object of JSON, and None at the end."""
    with stream:
        for line in stream:
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    lines.put(found)
    lines.put(None)


@contextlib.contextmanager
def only_one() -> Iterator[bool]:
    """Waits until no other process on this machine is inside. Gives False, at once, where this process ends or the lock cannot
    be had at all. Trials beside each other would disturb each other's times and take twice the memory."""
    path = os.path.join(tempfile.gettempdir(), LOCK)
    try:
        handle = _locked(path)
    except OSError:
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # another user's; Windows removes no open file
                os.unlink(path)
            os.close(handle)  # which unlocks it


def _locked(path: str) -> int | None:
    """The file, open and locked; None where this process ends before that."""
    while True:
        handle = _lock_file(path)
        while not _lock(handle):
            if ending.wait(ASK_EVERY):
                os.close(handle)
                return None
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # who held it before has removed it, and others lock the one that is there now


def _lock_file(path: str) -> int:
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if sys.platform == "win32":
        return os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o644)
    except PermissionError:  # another user's, which the system lets nobody else create
        return os.open(path, os.O_RDONLY | flags)


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
