"""Joins names for sentences."""
from collections.abc import Iterable


def join_some(names: Iterable, limit: int = 3) -> str:
    """Returns the first names and how many more there are: 'a, b, c and 4 more'."""
    names = list(map(str, names))
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
