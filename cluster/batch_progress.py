"""What a batch says while it runs."""
import collections
import sys
import time

RECENT = 200  # rows, for the rate
LINE = 100  # characters, which cover what a line of progress has left on a terminal


class Progress:
    """Counts answers of `RowRenderer`, says what failed, and now and then how far it is. total:
    rows to draw."""

    def __init__(self, total: int, say=print):
        self.total, self.say, self.counts = total, say, collections.Counter()
        self.times, self.workers, self.shown = collections.deque(maxlen=RECENT), {}, 0.0
        self.on_terminal = sys.stdout.isatty()

    def add(self, answer: dict):
        """An answer that is a row's last."""
        now = time.monotonic()
        self.counts[answer["status"]] += 1
        self.times.append(now)
        self.workers[answer["worker"]] = now
        if answer["status"] == "failed":
            self.tell(f"{answer['id']}: {answer['message']}")
        if (
            now - self.shown > (0.5 if self.on_terminal else 10)
            or self.counts.total() == self.total
        ):
            self.shown = now
            self.say(self.line(now), end="\r" if self.on_terminal else "\n", flush=True)

    def tell(self, text: str):
        self.say(text.ljust(LINE) if self.on_terminal else text, flush=True)

    def line(self, now: float) -> str:
        """Rows, rate, workers, failures and time left."""
        done, failed = self.counts.total(), self.counts["failed"]
        # without the start of the workers
        rate = (len(self.times) - 1) / max(now - self.times[0], 1e-3)
        busy = sum(now - seen < max(60, 3 * len(self.workers) / max(rate, 1e-6))
                   for seen in self.workers.values())
        workers = "1 worker" if busy == 1 else f"{busy} workers"
        counts = f"{done} of {self.total} rows, {workers}, {failed} failed"
        if not rate:
            return counts
        return f"{counts}, {rate:.3g} a second, {duration((self.total - done) / rate)} left   "


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.2 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
