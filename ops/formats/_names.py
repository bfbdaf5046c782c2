"""Finds formats by name, including those that are made for a block length or a row length."""
import re

from . import bnb_4bit, column_groups
from .base import FORMATS, Format
from .low_rank_and_joined import FACTOR_DTYPES, AddedLowRank, Joined, Scaled
from .row_layout import FAMILIES


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
    if match := re.fullmatch(r"JOINED_(ROWS|COLUMNS)_(.+)", name):
        pieces = [re.fullmatch(r"(\d+)x(\d+)x(.+)", piece) for piece in match[2].split("+")]
        parts = [(format_named(piece[3]), int(piece[1]), int(piece[2]))
                 for piece in pieces if piece]
        if len(parts) < len(pieces) or not all(rows * columns for _, rows, columns in parts):
            raise KeyError(name)
        return Joined.of(("ROWS", "COLUMNS").index(match[1]), *parts)
    if match := re.fullmatch(r"(\w+)_(\d+)_(\d+)x(\d+)", name):
        columns, outer, inner = map(int, match.groups()[1:])
        return column_groups.ColumnGroups.of(FORMATS[match[1]], columns, outer, inner)
    if match := re.fullmatch(r"(\w+?)((?:_\d+)+)", name):
        family, numbers = match.groups()
        base, lengths = FORMATS.get(family), [int(number) for number in numbers[1:].split("_")]
        if family in FAMILIES and len(lengths) <= 1 + len(FAMILIES[family].sizes):
            return FAMILIES[family].of_columns(*lengths)
        if isinstance(base, bnb_4bit.Codebook4Bit) and len(lengths) == 1:
            return base.of_block_length(*lengths)
    raise KeyError(name)
