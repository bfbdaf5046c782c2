"""Takes the times of ways to do the same thing in turn, and the memory that they take."""
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping


def time_in_turn(variants: Mapping[str, Callable[[], object]], rounds: int,
                 clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Runs variants one after another, round after round, so that a noisy machine disturbs all of
    them alike.

    Args:
        variants: name -> what is timed. Its attribute `prepare`, if it has one, is called before
            each run and not timed.
        rounds: how many.
        clock: gives seconds; it waits for what a GPU was given, if `run` does not.

    Returns:
        The seconds of each run of each variant.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            getattr(run, "prepare", lambda: None)()
            started = clock()
            run()
            times[name].append(clock() - started)
    return times


@contextlib.contextmanager
def peak(read: Callable[[], int], interval: float = 0.02) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the largest number that `read` has returned in the block, being
    called every `interval` seconds."""
    largest, is_done = read(), threading.Event()

    def sample():
        nonlocal largest
        while not is_done.wait(interval):
            largest = max(largest, read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: largest
    finally:
        is_done.set()
        thread.join()
