"""Finds formats by name, including those that are made for a block length or a row length."""
import re

from ..format import FORMATS, Format
from . import bnb_4bit, bnb_int8, column_groups


def format_named(name: str) -> type[Format]:
    """Returns a format by its name in `FORMATS`, and makes it if this process has not yet.

    Raises:
        KeyError: No format has this name.
    """
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"(\w+)_(\d+)_(\d+)x(\d+)", name):
        columns, outer, inner = map(int, match.groups()[1:])
        return column_groups.ColumnGroups.of(FORMATS[match[1]], columns, outer, inner)
    if match := re.fullmatch(r"(\w+)_(\d+)", name):
        base, length = FORMATS.get(match[1]), int(match[2])
        if match[1] == "INT8":
            return bnb_int8.INT8.of_columns(length)
        if base is not None and issubclass(base, bnb_4bit.Codebook4Bit):
            return base.of_block_length(length)
    raise KeyError(name)
