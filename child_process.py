"""Starts other programs, each of which ends when this process does, at the latest.

The only file that starts any. docs/security.md lists who asks for which, with which arguments.
"""
import atexit
import os
import signal
import subprocess
import threading

_imported_by = os.getpid()
_running: set[subprocess.Popen] = set()
_starting = threading.Lock()
_ending = False


def run_process(*command: str, seconds: float,
                env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Its output. After `seconds`, and when this process ends, it is killed with all it has
    started. POSIX only. env: its environment, if not that of this process.

    Raises subprocess.TimeoutExpired, OSError.
    """
    process = start_process(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env)
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        end_process(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def start_process(*command: str, **options) -> subprocess.Popen:
    """A program that is killed when this process ends, at the latest. options: of
    `subprocess.Popen`. Raises OSError."""
    with _starting:
        if _ending:
            raise OSError(f"{command[0]} is not started: this process ends")
        process = subprocess.Popen(command, start_new_session=True, **options)
        _running.add(process)
    return process


def end_process(process: subprocess.Popen):
    """Kills it with all it has started (on Windows alone) where it runs, and waits for its end."""
    _kill(process)
    process.wait()
    _running.discard(process)


def _kill(process: subprocess.Popen):
    if process.returncode is None:  # so the number is still its own
        if not hasattr(os, "killpg"):
            process.kill()
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def is_ending() -> bool:
    """Whether this process ends, or its main thread has: Python starts no thread and no process
    then, while the last threads go on."""
    return _ending or not threading.main_thread().is_alive()


@atexit.register
def end_all():
    """Kills what runs; nothing is started any more. A copy of the process that started it lets it
    run."""
    global _ending
    if os.getpid() != _imported_by:
        return
    with _starting:
        _ending = True
        for process in list(_running):
            _kill(process)
