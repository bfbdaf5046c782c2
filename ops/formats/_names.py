"""Finds formats by name, including those that are made for a block length or a row length."""
import re

from ..format import FORMATS, Format
from . import bnb_4bit, column_groups, composite
from ._rows import FAMILIES


def format_named(name: str) -> type[Format]:
    """Returns a format by its name in `FORMATS`, and makes it if this process has not yet.

    Raises:
        KeyError: No format has this name.
    """
    if name in FORMATS:
        return FORMATS[name]
    if (made := composite.composite_named(name, format_named)) is not None:
        return made
    if match := re.fullmatch(r"(\w+)_(\d+)_(\d+)x(\d+)", name):
        columns, outer, inner = map(int, match.groups()[1:])
        return column_groups.ColumnGroups.of(FORMATS[match[1]], columns, outer, inner)
    if match := re.fullmatch(r"(\w+?)((?:_\d+)+)", name):
        family, numbers = match.groups()
        base, lengths = FORMATS.get(family), [int(number) for number in numbers[1:].split("_")]
        if family in FAMILIES and len(lengths) <= 1 + len(FAMILIES[family].sizes):
            return FAMILIES[family].of_columns(*lengths)
        if base is not None and issubclass(base, bnb_4bit.Codebook4Bit) and len(lengths) == 1:
            return base.of_block_length(*lengths)
    raise KeyError(name)
