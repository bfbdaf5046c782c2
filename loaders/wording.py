"""Lists of names in sentences."""
from collections.abc import Iterable


def join_some(names: Iterable, most: int = 3) -> str:
    """Return the first names of a list, and how many more there are: 'a, b, c and 4 more'."""
    names = list(map(str, names))
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
