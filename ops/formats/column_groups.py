"""Formats of weights whose groups of columns have another order in the model than in the file.

A block of a K-quant holds 256 columns of a row, so smaller groups of columns cannot be moved within
the bytes, and what is rotated has to stay together. The bytes stay as they are, and each row is
reordered when it is dequantised.
"""
import torch

from .base import Format, chunk_values
from .low_rank_and_joined import Composite, DequantizeInto


class ColumnGroups(Composite):
    """A row of blocks of `base` as one block, its columns transposed.

    The columns, viewed as (outer, inner, n), are read as (inner, outer, n). The tensors are those
    of `base`.
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
        self.is_host_format, blocks = base.is_host_format, columns // base.block_length
        self.block_length, self.block_bytes = columns, blocks * base.block_bytes
        self.qparams = tuple(
            qparam if qparam.is_shared else qparam._replace(count=qparam.count * blocks)
            for qparam in base.qparams)

    def title(self) -> str:
        return self.base.title() if self.qparams else self.name

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor,
                         first: int, dequantize_into: DequantizeInto) -> torch.Tensor:
        rows = out.view(-1, self.block_length)
        blocks = self.block_length // self.base.block_length
        step = max(1, chunk_values(out.device) // self.block_length)
        for start in range(0, len(rows), step):
            part = rows[start:start + step]
            values = torch.empty_like(part)
            dequantize_into(self.base, tensors, values, (first + start) * blocks)
            groups = values.view(len(part), self.outer, self.inner, -1)
            part.view(len(part), self.inner, self.outer, -1).copy_(groups.transpose(1, 2))
        return out

    def write(self, out: torch.Tensor, *blocks: torch.Tensor):
        self.dequantize_into(list(blocks), out)


class TapsFirst(ColumnGroups):
    """The kernels of convolutions whose codes have the positions outermost; pickles of earlier
    versions have this class."""

    @classmethod
    def of(cls, base: Format, taps: int) -> ColumnGroups:
        """Returns the format of kernels with some positions, a block of `base` for each output
        channel."""
        columns = base.block_length
        return ColumnGroups.of(base, columns, taps, columns // taps)
