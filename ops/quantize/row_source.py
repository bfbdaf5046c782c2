"""A weight that is read in slices of rows while it is packed."""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Values that are read at a time: 16 MB in float32.
READ_VALUES = 1 << 22


@dataclass(frozen=True)
class RowSource:
    """A weight of which only some rows are in memory at a time.

    Attributes:
        shape: (N, ...); a row is all that has the same first index.
        read: Called with the first row and the one after the last; returns them, (n, ...) of any
            float dtype, the same at each call. Rows are read up to three times.
        device: Of the rows, where they are packed.
    """
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    device: torch.device

    @classmethod
    def of(cls, weight: "torch.Tensor | RowSource") -> "RowSource":
        """Returns a weight as a source of its rows."""
        if isinstance(weight, RowSource):
            return weight
        return cls(tuple(weight.shape), lambda start, stop: weight.detach()[start:stop],
                   weight.device)

    @property
    def columns(self) -> int:
        """Values of a row."""
        return math.prod(self.shape[1:])

    def slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields slices of about `READ_VALUES`, and their rows."""
        rows, step = self.shape[0], max(1, READ_VALUES // self.columns)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield slice(start, stop), self.read(start, stop)
