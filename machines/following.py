"""Answers of a pass of a batch as they come, for as long as there is a machine that can give more."""
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

LOOK = 5.0  # seconds without an answer after which is looked whether a machine is left
GONE = 600.0  # seconds that one has to come back, or a cluster to start another
PATIENCE = 10.0  # seconds that passes have to end
LISTENER = "answers of a pass"


def followed(answers: Iterable, is_possible: Callable[[], bool], say: Callable) -> Iterator:
    """The answers, which end early where no more are possible: Ray Data would wait for a machine for ever.

    They are taken in a thread of their own, which then stays behind until this process ends. say: as print.
    """
    heard, gone_since = queue.SimpleQueue(), None

    def listen():
        try:
            for answer in answers:
                heard.put((answer, None))
            heard.put((None, None))
        except BaseException as error:
            heard.put((None, error))

    threading.Thread(target=listen, daemon=True, name=LISTENER).start()
    while True:
        try:
            answer, error = heard.get(timeout=min(LOOK, GONE))
        except queue.Empty:
            if is_possible():
                gone_since = None
            elif gone_since is None:
                gone_since = time.monotonic()
                say(f"No machine is left that could draw the rest; waiting {GONE:g} s for one.", flush=True)
            elif time.monotonic() - gone_since > GONE:
                return
            continue
        if error:
            raise error
        if answer is None:
            return
        gone_since = None
        yield answer


def asking() -> list[threading.Thread]:
    """The threads of this process that ask Ray for the answers of passes: those of `followed`, and Ray Data's behind them."""
    return [thread for thread in threading.enumerate()
            if thread.name == LISTENER or type(thread).__module__.startswith("ray.data.") and hasattr(thread, "shutdown")]


def end_passes():
    """End them. Who asks Ray after its end ends the process, without a word."""
    end = time.monotonic() + PATIENCE
    while (left := asking()) and time.monotonic() < end:  # Ray Data's do not hear it just after their start
        for thread in left:
            if thread.name != LISTENER:
                with contextlib.suppress(Exception):
                    thread.shutdown(force=False)
            thread.join(0.1)
