"""Shows how far a long task is, on its node and in the terminal; a cancelled one ends at its next
step."""
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from comfy.utils import ProgressBar
from tqdm import tqdm

from ..ops.log import PREFIX

STEPS = 100  # of each stage
DELAY_SECONDS = 2.0  # a stage that is over before shows no numbers
INTERVAL_SECONDS = 1.0  # between two texts on the node
LOG_SECONDS = 10.0  # between two lines where the output is no terminal

_text_sender: Callable[[], Callable[[str], None]] | None = None


def set_text_sender(text_sender: Callable[[], Callable[[str], None]]):
    """Sets what returns the function that shows a text on the node that runs now."""
    global _text_sender
    _text_sender = text_sender


class Progress:
    """A progress bar of several stages, with the time left of those that take long.

    The stages share the bar evenly, because nobody knows how long the host will take to build a
    model. Once the user has cancelled, each step raises the host's InterruptProcessingException,
    which is not an Exception.

    Args:
        stages: what is done in each, such as "reading".
    """

    def __init__(self, *stages: str):
        self.heading = ""
        self._stages = stages
        self._bar = ProgressBar(len(stages) * STEPS)
        self._send_text = _text_sender() if _text_sender else lambda text: None
        self._finished = 0
        self._show(0)
        self._show_text(stages[0])

    def _show(self, part: float):
        self._bar.update_absolute(round((self._finished + part) * STEPS))

    def set_heading(self, text: str):
        """Shows a text above the stage from now on."""
        self.heading = text
        self._show_text(self._stages[self._finished])

    def _show_text(self, text: str):
        self._send_text("\n".join(filter(None, [self.heading, text])))

    def track(self, items: Collection, sizes: Sequence[int] | None = None,
              heading: str = "") -> Iterator:
        """Yields the items and advances the bar after each; all of them are one stage.

        Args:
            items: to iterate over.
            sizes: weights of the items, if they differ.
            heading: shown above this stage.
        """
        if heading:
            self.set_heading(heading)
        stage = self._stages[self._finished]
        total = sum(sizes or ()) or len(items)
        shown = time.monotonic() + DELAY_SECONDS - INTERVAL_SECONDS
        with tqdm(total=total, desc=f"{PREFIX}{stage}", delay=DELAY_SECONDS, leave=False,
                  mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
                  bar_format="{desc} {percentage:.0f}%|{bar}| {elapsed}, {remaining} left"
                  ) as terminal:
            for item, size in zip(items, sizes or [1] * len(items)):
                yield item
                terminal.update(size)
                self._show(terminal.n / total)
                if time.monotonic() - shown > INTERVAL_SECONDS:
                    shown = time.monotonic()
                    self._show_text(f"{stage}: {_numbers(terminal)}")
        if heading:
            self.heading = ""
        self.stage()

    def stage(self):
        """Advances the bar to the end of a stage, or past one without known steps."""
        self._finished += 1
        self._show(0)
        if self._finished < len(self._stages):
            self._show_text(self._stages[self._finished])


def _numbers(terminal: tqdm) -> str:
    numbers = terminal.format_dict
    seconds = numbers["elapsed"] * (numbers["total"] - numbers["n"]) / numbers["n"]
    return f"{numbers['n'] / numbers['total']:.0%}, {tqdm.format_interval(seconds)} left"
