"""The thread that compiles and validates kernels while torch does their work."""
import atexit
import queue
import threading
import time
from collections.abc import Callable

from ...child_process import end_all, is_ending
from ..log import log

WAIT_INTERVAL_SECONDS = 0.05  # how often a wait checks whether the user cancelled
EXIT_SECONDS = 10  # how long an exiting process waits for its threads, whose compilers are killed


def _never_cancelled():
    pass


# Called during a wait; raises where the user cancelled. The extension puts ComfyUI's function here.
raise_if_cancelled: Callable[[], None] = _never_cancelled

_work: "queue.SimpleQueue[Callable[[], None]]" = queue.SimpleQueue()
_threads: set[threading.Thread] = set()
_starting = threading.Lock()
_worker: threading.Thread | None = None


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread that does not keep the process alive.

    An exiting process waits for it: `work` must return soon once the process is ending.
    """
    def run():
        try:
            work()
        finally:
            _threads.discard(thread)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def submit(work: Callable[[], None]):
    """Has the one thread for it do some work, after what it was given before."""
    global _worker
    _work.put(work)
    with _starting:
        if _worker is None or not _worker.is_alive():  # a fork has none
            _worker = start_thread(_do_work, "featherweight-kernels")


def _do_work():
    while not is_ending():
        work = _work.get()
        try:
            work()
        except Exception:  # a compiler or driver may raise anything
            log.debug("Work on kernels failed.", exc_info=True)
        del work  # with the model that it may be about


def wait(is_done: Callable[[], bool], seconds: float) -> bool:
    """Waits at most `seconds` until something is done. Returns whether it is.

    Raises:
        Exception: What `raise_if_cancelled` raises.
    """
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end:
        raise_if_cancelled()
        time.sleep(WAIT_INTERVAL_SECONDS)
    return is_done()


@atexit.register
def _wait_for_all():
    """Waits for the threads: one inside torch at the interpreter's end would crash the process."""
    end_all()
    _work.put(lambda: None)  # wakes the worker
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
