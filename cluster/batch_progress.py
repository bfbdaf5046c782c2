"""Prints how far a batch is."""
import collections
import sys
import time
from collections.abc import Callable

RECENT = 200  # rows, for the rate
LINE = 100  # characters, enough to cover a line of progress that is on a terminal


class BatchProgress:
    """Counts answers of `RowRenderer`, prints failures and now and then a line of progress.

    Args:
        total: rows to render.
        say: prints a text, with the arguments of `print`.
    """

    def __init__(self, total: int, say: Callable[..., None] = print):
        self.total = total
        self.say = say
        self.counts = collections.Counter()  # by status
        self.times = collections.deque(maxlen=RECENT)  # when answers came
        self.workers: dict[str, float] = {}  # name -> when it answered last
        self.printed = 0.0
        self.on_terminal = sys.stdout.isatty()

    def add(self, answer: dict):
        """Counts a row's last answer."""
        now = time.monotonic()
        self.counts[answer["status"]] += 1
        self.times.append(now)
        self.workers[answer["worker"]] = now
        if answer["status"] == "failed":
            self.log(f"{answer['id']}: {answer['message']}")
        is_last = self.counts.total() == self.total
        if is_last or now - self.printed > (0.5 if self.on_terminal else 10):
            self.printed = now
            self.say(self.line(now), end="\r" if self.on_terminal else "\n", flush=True)

    def log(self, text: str):
        """Prints a line over the line of progress."""
        self.say(text.ljust(LINE) if self.on_terminal else text, flush=True)

    def line(self, now: float) -> str:
        """Returns the line of progress: rows, workers, failures, rate and time left."""
        done, failed = self.counts.total(), self.counts["failed"]
        # from the first answer on, without the start of the workers
        rate = (len(self.times) - 1) / max(now - self.times[0], 1e-3)
        idle_seconds = max(60, 3 * len(self.workers) / max(rate, 1e-6))
        busy = sum(now - answered < idle_seconds for answered in self.workers.values())
        workers = "1 worker" if busy == 1 else f"{busy} workers"
        counts = f"{done} of {self.total} rows, {workers}, {failed} failed"
        if not rate:
            return counts
        return f"{counts}, {rate:.3g} a second, {duration((self.total - done) / rate)} left   "


def duration(seconds: float) -> str:
    """Returns a time as people write it: 40 s, 12 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
