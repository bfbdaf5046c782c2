"""The bar of a load on its node. The host ends a load that the user cancels at its next step."""
from collections.abc import Collection, Iterator, Sequence

from comfy.utils import ProgressBar

STEPS = 100  # of a stage


class Progress:
    """A load of several stages, shown as if they took the same time: how long the host builds a
    model is not known before.

    Once the user has cancelled, each step raises the host's InterruptProcessingException, which is
    not an Exception.
    """

    def __init__(self, stages: int):
        self._bar = ProgressBar(stages * STEPS)
        self._over = 0
        self._show(0)

    def _show(self, part: float):
        self._bar.update_absolute(round((self._over + part) * STEPS))

    def track(self, items: Collection, sizes: Sequence[int] | None = None) -> Iterator:
        """Gives the items one by one and moves the bar by each; together they are a stage. sizes:
        of each, if they differ."""
        done, whole = 0, sum(sizes or ()) or len(items)
        for item, size in zip(items, sizes or [1] * len(items)):
            yield item
            done += size
            self._show(done / whole)
        self._over += 1

    def stage(self):
        """Moves the bar to the end of a stage whose steps are not known."""
        self._over += 1
        self._show(0)
