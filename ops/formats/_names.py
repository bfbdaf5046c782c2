"""Formats by their names, those too that are made of a file's numbers."""
import re

from ..format import FORMATS, Format
from . import bnb_int8, column_groups


def format_named(name: str) -> type[Format]:
    """A format by its name in `FORMATS`, in a process that has not made it yet too; KeyError for
    one unknown here."""
    of_rows = re.fullmatch(r"(\w+)_(\d+)_(\d+)x(\d+)", name)
    of_length = re.fullmatch(r"(\w+)_(\d+)", name)
    if name in FORMATS:
        return FORMATS[name]
    if of_rows:
        return column_groups.ColumnGroups.of(FORMATS[of_rows[1]], *map(int, of_rows.groups()[1:]))
    if of_length and of_length[1] == "INT8":
        return bnb_int8.INT8.of_columns(int(of_length[2]))
    if of_length and hasattr(FORMATS.get(of_length[1]), "of_block_length"):
        return FORMATS[of_length[1]].of_block_length(int(of_length[2]))
    return FORMATS[name]
