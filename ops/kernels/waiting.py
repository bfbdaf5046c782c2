"""Waiting for compilers and other processes, which ComfyUI may cancel, and the threads for it."""
import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...child_process import end_all, is_ending

WAIT_INTERVAL_SECONDS = 0.05  # how often a wait checks whether the user cancelled
EXIT_SECONDS = 10  # how long an exiting process waits for its threads, whose compilers are killed


@dataclass
class Host:
    """What ComfyUI does while kernels are checked.

    Attributes:
        raise_if_cancelled: Raises where the user cancelled.
        free_memory: (bytes, device) -> makes room on a GPU.
        progress: (what is done, count) -> an iterator that advances a bar at each of `count` steps.
    """
    raise_if_cancelled: Callable[[], None] = lambda: None
    free_memory: Callable[..., object] = lambda nbytes, device: None
    progress: Callable[[str, int], Iterator] = lambda text, count: iter(())


host = Host()  # the extension puts ComfyUI's functions here
_threads: set[threading.Thread] = set()


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


def side_by_side(works: Sequence[Callable[[], None]], count: int) -> Iterator[None]:
    """Does some work in several threads, and yields each time that a part of it is done.

    Args:
        works: The parts, which raise nothing.
        count: Of threads.

    Raises:
        Exception: What `host.raise_if_cancelled` raises; no further part is begun then.
    """
    waiting, done = list(reversed(works)), []

    def do_next():
        while waiting and not is_ending():
            try:
                work = waiting.pop()
            except IndexError:  # another thread took the last one
                return
            work()
            done.append(None)

    threads = [start_thread(do_next, "featherweight-kernels") for _ in range(count)]
    try:
        for reached in range(1, len(works) + 1):
            while len(done) < reached and any(thread.is_alive() for thread in threads):
                host.raise_if_cancelled()
                time.sleep(WAIT_INTERVAL_SECONDS)
            yield
    finally:
        waiting.clear()


def wait(is_done: Callable[[], bool], seconds: float) -> bool:
    """Waits at most `seconds` until something is done. Returns whether it is.

    Raises:
        Exception: What `host.raise_if_cancelled` raises.
    """
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            return False
        host.raise_if_cancelled()
        time.sleep(WAIT_INTERVAL_SECONDS)
    return True


@atexit.register
def _wait_for_all():
    """Waits for the threads: one inside torch at the interpreter's end would crash the process."""
    end_all()
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0, end - time.monotonic()))
