"""Formats of weights whose groups of columns have another order in the model than in the file.

A block of a K-quant holds 256 columns of a row, so smaller groups of columns cannot be moved within
the bytes. The bytes stay as they are, and each row is reordered when it is dequantised.
"""
import torch

from .base import Format


class ColumnGroups(Format):
    """A row of blocks of `base` as one block, its columns transposed.

    The columns, viewed as (outer, inner, n), are read as (inner, outer, n).
    """

    def __init__(self, base: Format, columns: int, outer: int, inner: int):
        """Makes the format of rows packed in `base`.

        Args:
            base: format of the bytes.
            columns: values in a row, a multiple of `outer * inner` and of `base.block_length`.
            outer: groups in the order of the file.
            inner: groups within each of these.
        """
        self.name = f"{base.name}_{columns}_{outer}x{inner}"
        self.base, self.outer, self.inner = base, outer, inner
        self.block_length = columns
        self.block_bytes = columns // base.block_length * base.block_bytes

    def write(self, out: torch.Tensor, blocks: torch.Tensor):
        count = len(blocks)
        values = self.base.dequantize(blocks.reshape(-1, self.base.block_bytes))
        values = values.view(count, self.outer, self.inner, -1)
        out.view(count, self.inner, self.outer, -1).copy_(values.transpose(1, 2))
