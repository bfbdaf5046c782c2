"""Shows the progress of a load on its node; a cancelled load ends at its next step."""
from collections.abc import Collection, Iterator, Sequence

from comfy.utils import ProgressBar

STEPS = 100  # of each stage


class Progress:
    """A progress bar of several stages.

    The stages share the bar evenly, because nobody knows how long the host will take to build a
    model. Once the user has cancelled, each step raises the host's InterruptProcessingException,
    which is not an Exception.
    """

    def __init__(self, stages: int):
        self._bar = ProgressBar(stages * STEPS)
        self._finished = 0
        self._show(0)

    def _show(self, part: float):
        self._bar.update_absolute(round((self._finished + part) * STEPS))

    def track(self, items: Collection, sizes: Sequence[int] | None = None) -> Iterator:
        """Yields the items and advances the bar after each; all of them are one stage.

        Args:
            items: to iterate over.
            sizes: weights of the items, if they differ.
        """
        done = 0
        total = sum(sizes or ()) or len(items)
        for item, size in zip(items, sizes or [1] * len(items)):
            yield item
            done += size
            self._show(done / total)
        self._finished += 1

    def stage(self):
        """Advances the bar to the end of a stage without known steps."""
        self._finished += 1
        self._show(0)
