"""Threads in which kernels are compiled, checked and tried while torch does their work."""
import atexit
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from ...child_process import end_all, is_ending

MAX_THREADS = 4  # that compute a result; the others wait for their turn
CANCEL_CHECK_SECONDS = 0.05  # between two looks at whether the user cancelled
# that a process which ends waits for its threads, whose compilers are killed by then
EXIT_SECONDS = 10


def _nothing():
    pass


# Called while somebody waits; it raises what ends the wait, where the user cancelled. The extension
# puts the host's here.
raise_if_cancelled: Callable[[], None] = _nothing

_turns = threading.BoundedSemaphore(MAX_THREADS)
_threads: set[threading.Thread] = set()


def start_thread(work: Callable[[], None], name: str = "featherweight-kernels"):
    """A thread that does not keep the process alive, but is waited for when it ends. `work` ends
    soon then."""
    def run():
        try:
            work()
        finally:
            _threads.discard(thread)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


def compute_in_background(compute: Callable[[], object]) -> Future:
    """What `compute` will return. It must not raise."""
    future = Future()

    def run_in_turn():
        with _turns:
            if not is_ending():
                set_result(future, compute())

    start_thread(run_in_turn)
    return future


def set_result(future: Future, value: object):
    """Gives a future its value, unless it has one."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_result(value)


def wait(future: Future, seconds: float) -> bool:
    """Whether it has its value, after at most `seconds`. Raises what `raise_if_cancelled`
    raises."""
    end = time.monotonic() + seconds
    while not future.done() and (left := end - time.monotonic()) > 0:
        raise_if_cancelled()
        concurrent.futures.wait([future], min(left, CANCEL_CHECK_SECONDS))
    return future.done()


@atexit.register
def _wait_for_all():
    """A thread that is within torch when the interpreter goes would end the process with an
    error."""
    end_all()
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
