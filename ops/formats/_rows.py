"""The base of formats whose block is a whole row of a weight."""
from typing import Any

import torch

from ..format import FORMATS, Format, Side

FAMILIES: dict[str, type["RowFormat"]] = {}


class RowFormat(Format):
    """A block is a row of a weight of shape (N, columns).

    Attributes:
        bits: of a code.
        group: columns that share a scale, or that are rotated together; 0: a whole row.
        family: name of the class that is the same for rows of all lengths.
    """

    bits = 8
    group = 0
    family: str

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "block_bytes" not in vars(cls):
            FAMILIES[cls.__name__] = cls

    @classmethod
    def of_columns(cls, columns: int, group: int | None = None) -> type["RowFormat"]:
        """Returns the format of rows of a length, a multiple of `group`.

        Args:
            columns: values in a row.
            group: where it is not that of the class.
        """
        name = f"{cls.__name__}_{columns}"
        block_bytes = columns * cls.bits // 8
        attributes: dict[str, Any] = {
            "block_length": columns, "block_bytes": block_bytes, "family": cls.__name__
        }
        if group not in (None, cls.group):
            name += f"_{group}"
            attributes["group"] = group
        packed_format: Any = FORMATS.get(name)
        if packed_format is None:
            attributes["sides"] = cls.sides_of(columns, cls.group if group is None else group)
            packed_format = type(name, (cls,), attributes)
        return packed_format

    @classmethod
    def sides_of(cls, columns: int, group: int) -> tuple[Side, ...]:
        """Returns `sides` for rows of a length in groups: here a scale in float32 for each row."""
        return (Side(torch.float32),)
