"""Checks of numbers in prompts. Python's JSON reader accepts NaN and infinity."""
import math


def reject_nan(**inputs: float):
    """Raises ValueError for an input that is NaN. inputs: values by the names for the message."""
    for name, value in inputs.items():
        if math.isnan(value):
            raise ValueError(f"{name} is not a number; expected one such as 1.")


def reject_infinite(**inputs: float):
    """Raises ValueError for an input that is NaN or infinite, as `reject_nan` does."""
    reject_nan(**inputs)
    for name, value in inputs.items():
        if math.isinf(value):
            raise ValueError(f"{name} is infinite; expected a number such as 1.")
