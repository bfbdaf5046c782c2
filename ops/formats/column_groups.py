"""Rows whose groups of columns a model has in another order than its file.

A block of a K-quant holds 256 columns of a row, so smaller groups of columns cannot change places
as bytes. The bytes stay as they are, and each row is put in order while it is dequantised.
"""
import torch

from ..format import FORMATS, Format


class ColumnGroups(Format):
    """A whole row of blocks of `base` as one block. Its columns, seen as (outer, inner, n), read as
    (inner, outer, n)."""

    base: type[Format]
    outer: int
    inner: int

    @classmethod
    def of(cls, base: type[Format], columns: int, outer: int, inner: int) -> type["ColumnGroups"]:
        """The format of rows of `columns` values packed in `base`, which `outer * inner` and
        `base.block_length` divide."""
        name = f"{base.__name__}_{columns}_{outer}x{inner}"
        block_bytes = columns // base.block_length * base.block_bytes
        return FORMATS.get(name) or type(
            name,
            (cls,),
            {
                "base": base,
                "outer": outer,
                "inner": inner,
                "block_length": columns,
                "block_bytes": block_bytes,
            },
        )

    @classmethod
    def write(cls, out: torch.Tensor, blocks: torch.Tensor):
        values = cls.base.dequantize(blocks.reshape(-1, cls.base.block_bytes)).view(
            len(blocks), cls.outer, cls.inner, -1)
        out.view(len(blocks), cls.inner, cls.outer, -1).copy_(values.transpose(1, 2))
