"""Threads in which kernels are compiled, checked and tried while torch does their work."""
import atexit
import threading
import time
from collections.abc import Callable

from ...child_process import end_all, is_forked

MAX_THREADS = 4  # that compute a result; the others wait for their turn
CANCEL_CHECK_SECONDS = 0.05  # between two looks at whether the user cancelled
EXIT_SECONDS = 10  # that a process which ends waits for its threads, whose compilers are killed by then


def _nothing():
    pass


# Called while somebody waits; it raises what ends the wait, where the user cancelled. The extension puts the host's here.
raise_if_cancelled: Callable[[], None] = _nothing

_turns = threading.BoundedSemaphore(MAX_THREADS)
_threads: set[threading.Thread] = set()
ending = threading.Event()  # this process ends


def is_ending() -> bool:
    """Whether this process ends, or its main thread has: Python starts no thread and no process then, while the last
    threads go on."""
    return ending.is_set() or not threading.main_thread().is_alive()


def start_thread(work: Callable[[], None], name: str = "featherweight-kernels"):
    """A thread that does not keep the process alive, but is waited for when it ends. `work` ends soon once `ending` is set."""
    def run():
        try:
            work()
        finally:
            _threads.discard(thread)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


class WriteOnceFuture:
    """A result that is set once: by a thread, or before that by a caller who could not wait any longer.

    Args:
        compute: called once, must not raise.
        in_background: False calls it at once, in this thread.
    """

    def __init__(self, compute: Callable[[], object], in_background: bool = True):
        self.value = None
        self._compute = compute
        self._done, self._setting = threading.Event(), threading.Lock()
        if in_background:
            start_thread(self._run_in_turn)
        else:
            self.set(compute())

    def _run_in_turn(self):
        with _turns:
            if not ending.is_set():
                self.set(self._compute())

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def set(self, value):
        """The first value given stays."""
        with self._setting:
            if not self.done:
                self.value = value
                self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is set, after at most `seconds`. Raises what `raise_if_cancelled` raises."""
        end = time.monotonic() + seconds
        while not self.done and (left := end - time.monotonic()) > 0:
            raise_if_cancelled()
            self._done.wait(min(left, CANCEL_CHECK_SECONDS))
        return self.done


@atexit.register
def _wait_for_all():
    """A thread that is within torch when the interpreter goes would end the process with an error. A copy of this process
    has none of its threads."""
    if is_forked():
        return
    ending.set()
    end_all()
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
