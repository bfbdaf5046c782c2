"""Starts other programs, which are killed at the latest when this process ends.

No other file starts any. tests/security.md lists the callers and their arguments.
"""
import atexit
import contextlib
import os
import signal
import subprocess
import threading
from subprocess import DEVNULL, PIPE, CompletedProcess, Popen

_imported_by = os.getpid()
_running: set[Popen] = set()
_lock = threading.Lock()
_ending = False


def run_process(*command: str, seconds: float,
                env: dict[str, str] | None = None) -> CompletedProcess[str]:
    """Runs a program to its end and returns its output.

    Args:
        command: the program and its arguments.
        seconds: after this time, and when this process ends, the program is killed, see
            `end_process`.
        env: its environment, None for that of this process.

    Raises:
        subprocess.TimeoutExpired, OSError
    """
    process = start_process(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=env,
                            encoding="utf-8", errors="replace")
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        end_process(process)
    return CompletedProcess(command, process.returncode, output, errors)


def start_process(*command: str, **options) -> Popen:
    """Starts a program, which is killed at the latest when this process ends. On Windows it opens
    no window.

    Args:
        command: the program and its arguments.
        options: those of `Popen`, of Python's module `subprocess`.

    Raises:
        OSError
    """
    with _lock:
        if _ending:
            raise OSError(f"{command[0]} was not started: this process is ending")
        process = _popen(*command, start_new_session=True, **options)
        _running.add(process)
    return process


def _popen(*command: str, **options) -> Popen:
    return subprocess.Popen(
        command, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0), **options)


def end_process(process: Popen):
    """Kills a program with all that it has started, and waits for its end."""
    _kill(process)
    process.wait()
    _running.discard(process)


def _kill(process: Popen):
    if process.returncode is None:  # not reaped yet, so its process id cannot be another program's
        if not hasattr(os, "killpg"):
            taskkill = os.path.join(os.environ["SYSTEMROOT"], "System32", "taskkill.exe")
            _popen(taskkill, "/T", "/F", "/PID", str(process.pid), stdin=DEVNULL, stdout=DEVNULL,
                   stderr=DEVNULL).wait()
            process.kill()  # does nothing where it has ended
            return
        # a Mac refuses to signal a group of which only an ended program is left
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def is_ending() -> bool:
    """Returns whether this process or its main thread is ending.

    From then on Python starts no thread and no process, though threads that run go on.
    """
    return _ending or not threading.main_thread().is_alive()


@atexit.register
def end_all():
    """Kills all programs, and lets none start any more. Does nothing in a fork of this process."""
    global _ending
    if os.getpid() != _imported_by:
        return
    with _lock:
        _ending = True
        for process in list(_running):
            _kill(process)
