"""Says what the first set-up is at and how long the rest takes.

Standard library only: it runs before anything is installed.
"""
import time

# Seconds of the steps in their order, on two cores with a fast package index. Only their ratios
# count once the first is over.
SECONDS = {"venv": 5, "ComfyUI": 8, "torch": 25, "packages": 42, "optional": 22, "checks": 10}


class SetupProgress:
    """Prints a line for each step, with its number and the time left."""

    def __init__(self):
        self.started = time.monotonic()

    def begin(self, step: str, text: str):
        """Prints the line of a step.

        Args:
            step: a key of SECONDS.
            text: what is done now.
        """
        names = list(SECONDS)
        number = names.index(step)
        before = sum(SECONDS[name] for name in names[:number])
        slowness = max(1.0, (time.monotonic() - self.started) / before) if before else 1.0
        seconds = slowness * (sum(SECONDS.values()) - before)
        print(f"[{number + 1} of {len(names)}] {text}, about {duration(seconds)} left", flush=True)


def duration(seconds: float) -> str:
    """Returns a time in tens of seconds or in minutes."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min"
