"""Numbers of a prompt, which may hold NaN and infinity: JSON as Python reads it has them."""
import math


def reject_nan(**inputs: float):
    """Raise ValueError for an input that is not a number, named as in `inputs`."""
    for name, value in inputs.items():
        if math.isnan(value):
            raise ValueError(f"{name} is not a number. Give one, such as 1.")


def reject_infinite(**inputs: float):
    """Raise ValueError for an input that is not a number, or infinite."""
    reject_nan(**inputs)
    for name, value in inputs.items():
        if math.isinf(value):
            raise ValueError(f"{name} is infinite. Give a number such as 1.")
