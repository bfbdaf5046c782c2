"""Formats of weights whose groups of columns have another order in the model than in the file.

A block of a K-quant holds 256 columns of a row, so smaller groups of columns cannot be moved within
the bytes. The bytes stay as they are, and each row is reordered when it is dequantised.
"""
import torch

from .base import Format, define


class ColumnGroups(Format):
    """A row of blocks of `base` as one block, its columns transposed.

    The columns, viewed as (outer, inner, n), are read as (inner, outer, n).
    """

    base: type[Format]
    outer: int
    inner: int

    @classmethod
    def of(cls, base: type[Format], columns: int, outer: int, inner: int) -> type["ColumnGroups"]:
        """Returns the format of rows packed in `base`.

        Args:
            base: Format of the bytes.
            columns: Values in a row, a multiple of `outer * inner` and of `base.block_length`.
            outer: Groups in the order of the file.
            inner: Groups within each of these.
        """
        name = f"{base.__name__}_{columns}_{outer}x{inner}"
        return define(name, cls, lambda: {
            "base": base, "outer": outer, "inner": inner, "block_length": columns,
            "block_bytes": columns // base.block_length * base.block_bytes})

    @classmethod
    def write(cls, out: torch.Tensor, blocks: torch.Tensor):
        count = len(blocks)
        values = cls.base.dequantize(blocks.reshape(-1, cls.base.block_bytes))
        values = values.view(count, cls.outer, cls.inner, -1)
        out.view(count, cls.inner, cls.outer, -1).copy_(values.transpose(1, 2))
