"""Formats sizes in bytes for people."""
from collections.abc import Mapping

GB = 10 ** 9
UNITS = ((GB, "GB"), (10 ** 6, "MB"), (10 ** 3, "KB"))


def unit_of(size: float) -> tuple[int, str]:
    """Returns (bytes, name) of the largest unit that a size reaches."""
    return next(((scale, name) for scale, name in UNITS if size >= scale), (1, "bytes"))


def size_text(size: float, digits: int = 1) -> str:
    """Returns a size in its unit: '6.8 GB' (10^9 bytes), '312.0 KB', '96 bytes'.

    Args:
        size: in bytes.
        digits: after the decimal point.
    """
    scale, name = unit_of(size)
    return f"{size / scale:.{digits if scale > 1 else 0}f} {name}"


def part_text(part: float, whole: float) -> str:
    """Returns a part of a size in the unit of the whole: '4.0 of 6.8 GB'."""
    scale, _ = unit_of(whole)
    return f"{part / scale:.{1 if scale > 1 else 0}f} of {size_text(whole)}"


def type_lines(types: Mapping[str, tuple[int, int]], digits: int = 1) -> list[str]:
    """Returns a line for each type, by bytes: 'Q4_K: 304 tensors, 6.8 GB (98.1%)'.

    Args:
        types: type -> (number of tensors, bytes of all of them).
        digits: of the sizes, after the decimal point.
    """
    return [
        f"{name}: {count} tensor{'' if count == 1 else 's'}, {size_text(size, digits)}"
        f" ({share:.1%})"
        for name, count, size, share in _ranked(types)
    ]


def type_shares(types: Mapping[str, tuple[int, int]]) -> str:
    """Returns the types in one line, by bytes: 'Q4_K 98.1%, F32 1.9%'.

    Args:
        types: type -> (number of tensors, bytes of all of them).
    """
    return ", ".join(f"{name} {share:.1%}" for name, _, _, share in _ranked(types))


def _ranked(types: Mapping[str, tuple[int, int]]) -> list[tuple[str, int, int, float]]:
    """Returns (type, tensors, bytes, share of all bytes), the most bytes first."""
    total = sum(size for _, size in types.values()) or 1
    ranked = sorted(types.items(), key=lambda entry: -entry[1][1])
    return [(name, count, size, size / total) for name, (count, size) in ranked]
