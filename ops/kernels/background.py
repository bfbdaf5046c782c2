"""What a thread in the background finds out, such as whether a kernel compiles here and is right."""
import atexit
import threading
import time
from collections.abc import Callable

from ...child_process import end_all, is_forked

AT_ONCE = 4  # threads that find out something; the others wait for their turn
LOOK_EVERY = 0.05  # seconds between two looks at whether the user cancelled
AT_THE_END = 10  # seconds that a process which ends waits for its threads, whose compilers are killed by then


def _nothing():
    pass


# Called while somebody waits; it raises what ends the wait, where the user cancelled. The extension puts the host's here.
raise_if_cancelled: Callable[[], None] = _nothing

_turns = threading.BoundedSemaphore(AT_ONCE)
_threads: set[threading.Thread] = set()
ending = threading.Event()  # this process ends


def is_ending() -> bool:
    """Whether this process ends, or its main thread has: Python starts no thread and no process then, while the last threads go
    on."""
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


class Finding:
    """A value that is decided once: by what a thread finds out, or before that by who could not wait any longer.

    find_out: called once, in a thread of its own that does not keep the process alive; must not raise. in_background: False
    calls it at once, in this thread.
    """

    def __init__(self, find_out: Callable[[], object], in_background: bool = True):
        self.value = None
        self._find_out = find_out
        self._decided, self._deciding = threading.Event(), threading.Lock()
        if in_background:
            start_thread(self._run_in_turn)
        else:
            self.decide(find_out())

    def _run_in_turn(self):
        with _turns:
            if not ending.is_set():
                self.decide(self._find_out())

    @property
    def decided(self) -> bool:
        return self._decided.is_set()

    def decide(self, value):
        """The first value given stays."""
        with self._deciding:
            if not self.decided:
                self.value = value
                self._decided.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is decided, after at most `seconds`. Raises what `raise_if_cancelled` raises."""
        end = time.monotonic() + seconds
        while not self.decided and (left := end - time.monotonic()) > 0:
            raise_if_cancelled()
            self._decided.wait(min(left, LOOK_EVERY))
        return self.decided


@atexit.register
def _wait_for_all():
    """A thread that is within torch when the interpreter goes would end the process with an error. A copy of this process has
    none of its threads."""
    if is_forked():
        return
    ending.set()
    end_all()
    end = time.monotonic() + AT_THE_END
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
