"""Background threads that compile, check and try kernels while torch does their work."""
import atexit
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from ...child_process import end_all, is_ending

MAX_THREADS = 4  # that compute a result at the same time
CANCEL_CHECK_SECONDS = 0.05  # how often a wait checks whether the user cancelled
EXIT_SECONDS = 10  # how long an exiting process waits for its threads, whose compilers are killed


def _never_cancelled():
    pass


# Called during a wait; raises where the user cancelled. The extension puts ComfyUI's function here.
raise_if_cancelled: Callable[[], None] = _never_cancelled

_slots = threading.BoundedSemaphore(MAX_THREADS)
_threads: set[threading.Thread] = set()


def start_thread(work: Callable[[], None], name: str = "featherweight-kernels"):
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


def compute_in_background(compute: Callable[[], object]) -> Future:
    """Returns a future of what `compute` returns, which must not raise."""
    future = Future()

    def run_in_slot():
        with _slots:
            if not is_ending():
                set_result(future, compute())

    start_thread(run_in_slot)
    return future


def set_result(future: Future, value: object):
    """Sets a future's result, unless it has one."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_result(value)


def wait(future: Future, seconds: float) -> bool:
    """Waits at most `seconds` for a future's result. Returns whether it is there.

    Raises:
        Exception: What `raise_if_cancelled` raises.
    """
    end = time.monotonic() + seconds
    while not future.done() and (remaining := end - time.monotonic()) > 0:
        raise_if_cancelled()
        concurrent.futures.wait([future], min(remaining, CANCEL_CHECK_SECONDS))
    return future.done()


@atexit.register
def _wait_for_all():
    """Waits for the threads: one inside torch at the interpreter's end would crash the process."""
    end_all()
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
