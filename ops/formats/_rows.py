"""The base of formats whose block is a whole row of a weight."""
import torch

from .base import Format, Side, define

FAMILIES: dict[str, type["RowFormat"]] = {}


class RowFormat(Format):
    """A block is a row of a weight of shape (N, columns).

    Attributes:
        bits: of a code.
        group: columns that share a scale, or that are rotated together; 0: a whole row.
        family: name of the class that is the same for rows of all lengths.
        label: its name for people, where that is another.
        sizes: names of attributes that may differ from those of the class, in the order in which
            the name of a format has them.
    """

    bits = 8
    group = 0
    sizes = ("group",)
    family: str
    label: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "block_bytes" not in vars(cls):
            FAMILIES[cls.__name__] = cls

    @classmethod
    def of_columns(cls, columns: int, *sizes: int | None) -> type["RowFormat"]:
        """Returns the format of rows of a length.

        Args:
            columns: values in a row, a multiple of `group`.
            sizes: values of the attributes `cls.sizes`; None, or left out: the class's.
        """
        own: list[int] = [getattr(cls, name) for name in cls.sizes]
        given = [*sizes, *[None] * (len(own) - len(sizes))]
        chosen = [default if size is None else size for size, default in zip(given, own)]
        name = "_".join([cls.__name__, str(columns), *map(str, chosen if chosen != own else ())])
        return define(name, cls, lambda: dict(
            zip(cls.sizes, chosen), block_length=columns, family=cls.__name__,
            block_bytes=columns * cls.bits // 8, sides=cls.sides_of(columns, *chosen)))

    @classmethod
    def title(cls) -> str:
        return cls.label or cls.family

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        """Returns `sides` of `of_columns`: here a scale in float32 for each row."""
        return (Side(torch.float32),)
