"""Finds formats by name, including those that are made for a block length or a row length."""
import re

from . import bnb_4bit
from .base import FORMATS, Format
from .column_groups import ColumnGroups, TapsFirst
from .low_rank_and_joined import FACTOR_DTYPES, AddedLowRank, Joined, Scaled
from .row_layout import FAMILIES

NUMBERED = re.compile(r"(\w+?)((?:_\d+)+)")  # a name, and numbers of a format that is made of it


def format_named(name: str) -> Format:
    """Returns a format by its name in `FORMATS`, and makes it if this process has not yet.

    Raises:
        KeyError: No format has this name.
    """
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"LOWRANK_(\d+)(S?)_(BF16|F16|F32)_(BF16|F16|F32)_(.+)", name):
        rank, mark, up, down, base = match.groups()
        return AddedLowRank.of(format_named(base), int(rank), FACTOR_DTYPES[up],
                                 FACTOR_DTYPES[down], bool(mark))
    if match := re.fullmatch(r"SCALED(C?)_(\d+)_(.+)", name):
        mark, columns, base = match.groups()
        return Scaled.of(format_named(base), int(columns), bool(mark))
    if match := re.fullmatch(r"TAPS_(\d+)_(.+)", name):
        return TapsFirst.of(format_named(match[2]), int(match[1]))
    if match := re.fullmatch(r"JOINED_(ROWS|COLUMNS)_(.+)", name):
        pieces = [re.fullmatch(r"(\d+)x(\d+)x(.+)", piece) for piece in match[2].split("+")]
        parts = [(format_named(piece[3]), int(piece[1]), int(piece[2]))
                 for piece in pieces if piece]
        if len(parts) < len(pieces) or not all(rows * columns for _, rows, columns in parts):
            raise KeyError(name)
        return Joined.of(("ROWS", "COLUMNS").index(match[1]), *parts)
    if match := re.fullmatch(r"(\w+)_(\d+)_(\d+)x(\d+)", name):
        columns, outer, inner = map(int, match.groups()[1:])
        return ColumnGroups.of(format_named(match[1]), columns, outer, inner)
    if match := NUMBERED.fullmatch(name):
        family, lengths = match[1], _numbers(match)
        base = FORMATS.get(family)
        if family in FAMILIES and len(lengths) <= 1 + len(FAMILIES[family].sizes):
            return FAMILIES[family].of_columns(*lengths)
        if isinstance(base, bnb_4bit.Codebook4Bit) and len(lengths) == 1:
            return base.of_block_length(*lengths)
    raise KeyError(name)


def formats_of_key(key: str, multiple: int = 1) -> list[Format]:
    """Returns formats of a `kernel_key`, with which kernels are checked.

    Args:
        key: of a format.
        multiple: of which the columns of formats of rows are.

    Returns:
        The format of the name `key`, or formats of rows of several lengths.

    Raises:
        KeyError: no format has this key.
    """
    match = NUMBERED.fullmatch(key)
    family, sizes = (match[1], _numbers(match)) if match else (key, ())
    if family not in FAMILIES:
        return [format_named(key)]
    if len(sizes) not in (0, len(FAMILIES[family].sizes)):
        raise KeyError(key)
    return [*FAMILIES[family].examples(tuple(sizes), multiple)]


def _numbers(match: re.Match) -> list[int]:
    return [int(number) for number in match[2][1:].split("_")]
