"""Starts `trial` in a process of its own and hears what it says."""
import contextlib
import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from .background import ending
from .case_notes import trials_folder
from ...child_process import end_process, start_process

log = logging.getLogger(__name__)

START_SECONDS = 180  # that the process may take until it says something
ATTEMPT_SECONDS = 120  # that a kernel may take to be compiled, checked and timed
GRACE_SECONDS = 2  # between being told to end and being killed
LOCK = "lock"
ASK_EVERY = 1.0  # seconds, while another process holds the lock

# How a trial ended by the signals that no kernel sends. A system without memory kills what takes much, whoever it is.
ENDED_BY = {getattr(signal, name): how for name, how in {
    "SIGALRM": ("late", "the trial took all the time that it may"),
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
    """how: "ended", all was tried; "stopped", there was no room; "crashed", "hung", "killed" by another program,
    "late" or "failed". at: the backend and the text of what was being tried, if anything. why: in words."""
    how: str
    at: tuple[str, str] | None = None
    why: str = ""


def run_trial(job: dict, hear: Callable[[str, str, dict], None], seconds: float, command=COMMAND,
              attempt_seconds: float = ATTEMPT_SECONDS) -> Outcome:
    """Runs a trial to its end. job: see `trial`, which hears `seconds` from here. hear(backend, text, verdict): called for each
    verdict when it comes. Raises OSError where no process can be started."""
    background = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)
    process = start_process(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            creationflags=background)
    try:
        lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), name="featherweight-trial", daemon=True).start()
        with contextlib.suppress(OSError):  # it is gone already, which its output says too
            process.stdin.write(json.dumps(job | {"seconds": seconds + GRACE_SECONDS}).encode() + b"\n")
            process.stdin.flush()
        return _follow(process, lines, hear, seconds, attempt_seconds)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        end_process(process)


def _follow(process, lines: queue.SimpleQueue, hear, seconds: float, attempt_seconds: float) -> Outcome:
    at, limit, heard = None, START_SECONDS, time.monotonic()
    end = heard + seconds
    while True:
        try:
            line = lines.get(timeout=max(0, min(heard + limit, end) - time.monotonic()))
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
    """Waits until no other process of this user is inside. Gives False, at once, where this process ends or the lock cannot
    be had at all. Trials side by side would disturb each other's times and take twice the memory."""
    lock = FileLock(trials_folder() / LOCK)
    try:
        yield _acquire(lock)
    finally:
        lock.release()


def _acquire(lock: FileLock) -> bool:
    has_told = False
    while True:
        try:
            lock.acquire(timeout=0)
            return True
        except Timeout:
            if not has_told:
                log.info("[Featherweight] Another trial of kernels is under way; the next one begins when it has ended.")
                has_told = True
            if ending.wait(ASK_EVERY):
                return False
        except (OSError, NotImplementedError) as error:  # a drive without locks
            log.debug("[Featherweight] %s cannot be locked: %r", lock.lock_file, error)
            return False
