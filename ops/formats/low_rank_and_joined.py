"""Formats of weights that are made of weights in other formats.

`AddedLowRank` is a weight plus the product of two factors, as SVDQuant and SDNQ store it. `Scaled`
is a weight times numbers that its file has beside it. `Joined` is a weight whose rows or columns
come from several weights, such as the q, k and v of a fused layer. All are dequantised by the
kernels of the formats within, and a product may take the low rank as a branch (`without_low_rank`).
"""
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ..low_rank import LowRank, Slice
from .base import Format, QParam, chunk_values, dequantize_by_reference
from .bits import reinterpret

# dequantises as `Format.dequantize_into` does, the format being the first argument
DequantizeInto = Callable[..., torch.Tensor]
FACTOR_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ALIGNED = 64  # bytes, for the tensors of a part


class Composite(Format):
    """The base of formats that are made of others.

    Attributes:
        base: the only one, where there are not several.
    """

    base: Format

    def formats_within(self) -> Iterable[Format]:
        yield self.base

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor,
                         first: int, dequantize_into: DequantizeInto) -> torch.Tensor:
        """Dequantises blocks as `Format.dequantize_into` does, each part by a given function."""
        raise NotImplementedError

    def without_low_rank(self, tensors: list[torch.Tensor]
                         ) -> tuple[Format, list[torch.Tensor], LowRank | None]:
        """Splits a weight into what has to be dequantised and what a product takes as a branch.

        Args:
            tensors: of the whole weight.

        Returns:
            The format and the tensors of the rest, and the low rank in the dtypes of its factors,
            or None.
        """
        return self, tensors, None

    def dequantize_into(self, tensors: list[torch.Tensor], out: torch.Tensor,
                        first: int = 0) -> torch.Tensor:
        return self.dequantize_parts(tensors, out, first, dequantize_by_reference)


class AddedLowRank(Composite):
    """value = value of `base` + (up down) * up_scale * down_scale, in float32, rounded once.

    The tensors are those of `base`, then

    | tensor     | dtype, shape    | meaning                                                    |
    |------------|-----------------|------------------------------------------------------------|
    | up         | uint8           | bytes of (rows, rank) of the dtype in the format's name    |
    | down       | uint8           | bytes of (rank, K), in the basis of the codes if these are |
    |            |                 | rotated                                                    |
    | up_scale   | float32 (rows,) | only with `is_scaled`: a factor of each row of `up`        |
    | down_scale | float32 (K,)    | likewise, of each column of `down`                         |

    Attributes:
        base: whose block is a row.
        rank: of the product.
        up_dtype, down_dtype: of the factors.
    """

    def __init__(self, base: Format, rank: int, up_dtype: torch.dtype, down_dtype: torch.dtype,
                 is_scaled: bool):
        """Makes the format of a weight in `base` with a low rank; `is_scaled`: with factors."""
        names = {dtype: name for name, dtype in FACTOR_DTYPES.items()}
        mark = "S" if is_scaled else ""
        self.name = f"LOWRANK_{rank}{mark}_{names[up_dtype]}_{names[down_dtype]}_{base.name}"
        self.base, self.rank, self.up_dtype, self.down_dtype = base, rank, up_dtype, down_dtype
        self.block_length, self.block_bytes = base.block_length, base.block_bytes
        self.padding, self.is_host_format = base.padding, base.is_host_format
        down_bytes = rank * base.block_length * down_dtype.itemsize
        self.qparams = (*base.qparams, QParam(torch.uint8, rank * up_dtype.itemsize, name="up"),
                      QParam(torch.uint8, down_bytes, True, "down"))
        if is_scaled:
            self.qparams += (QParam(torch.float32, name="up_scale"),
                           QParam(torch.float32, base.block_length, True, "down_scale"))

    def title(self) -> str:
        return f"{self.base.title()}, rank {self.rank}"

    def factors(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns up (rows, rank) and down (rank, K), the latter in the basis of the input."""
        up, down, *scales = tensors[1 + len(self.base.qparams):]
        up = reinterpret(up, self.up_dtype).view(-1, self.rank)
        down = self.base.unrotated(reinterpret(down, self.down_dtype).view(self.rank, -1))
        if scales:
            return up * scales[0].unsqueeze(1), down * scales[1]
        return up, down

    def without_low_rank(self, tensors: list[torch.Tensor]
                         ) -> tuple[Format, list[torch.Tensor], LowRank | None]:
        up, down = self.factors(tensors)
        low_rank = LowRank(down, (up,), (Slice(0, len(up), 0, self.rank),))
        return self.base, tensors[:1 + len(self.base.qparams)], low_rank

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor,
                         first: int, dequantize_into: DequantizeInto) -> torch.Tensor:
        up, down = (factor.float() for factor in self.factors(tensors))

        def dequantize(values: torch.Tensor, row: int):
            dequantize_into(self.base, tensors[:1 + len(self.base.qparams)], values, row)
            values.addmm_(up[row:row + len(values)], down)

        return in_float(out.view(-1, self.block_length), first, dequantize, out)


class Scaled(Composite):
    """value = value of `base` * of_row * of_column, in float32, rounded once.

    A block is a row. The tensors are those of `base`, then

    | tensor    | dtype, shape    | meaning                                       |
    |-----------|-----------------|-----------------------------------------------|
    | of_row    | float32 (rows,) | a factor of each row                          |
    | of_column | float32 (K,)    | of each column, only with `by_column`          |

    Attributes:
        base: whose blocks divide a row.
        by_column: whether columns have factors.
    """

    def __init__(self, base: Format, columns: int, by_column: bool):
        """Makes the format of a weight in `base`, rows of `columns`, with factors."""
        blocks = columns // base.block_length
        self.name = f"SCALED{'C' if by_column else ''}_{columns}_{base.name}"
        self.base, self.by_column, self.is_host_format = base, by_column, base.is_host_format
        self.block_length, self.block_bytes = columns, blocks * base.block_bytes
        self.qparams = *(
            qparam if qparam.is_shared else qparam._replace(count=qparam.count * blocks)
            for qparam in base.qparams), QParam(torch.float32, name="of_row")
        if by_column:
            self.qparams += (QParam(torch.float32, columns, True, "of_column"),)

    def title(self) -> str:
        return f"{self.base.title()}, scaled"

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor,
                         first: int, dequantize_into: DequantizeInto) -> torch.Tensor:
        count = 1 + len(self.base.qparams)
        of_row, *of_column = tensors[count:]

        def dequantize(values: torch.Tensor, row: int):
            block = row * self.block_length // self.base.block_length
            dequantize_into(self.base, tensors[:count], values, block)
            values *= of_row[row:row + len(values)].unsqueeze(1)
            if of_column:
                values *= of_column[0]

        return in_float(out.view(-1, self.block_length), first, dequantize, out)


def in_float(rows: torch.Tensor, first: int, compute: Callable[[torch.Tensor, int], None],
             out: torch.Tensor) -> torch.Tensor:
    """Fills rows with values that are computed in float32, some rows at a time.

    Args:
        rows: of the result.
        first: index of the first row in the weight.
        compute: fills float32 rows; the second argument is the index of the first of them.
        out: what is returned.
    """
    step = max(1, chunk_values(rows.device) // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start:start + step]
        values = part if part.dtype == torch.float32 else torch.empty(
            part.shape, dtype=torch.float32, device=part.device)
        compute(values, first + start)
        if values is not part:
            part.copy_(values)
    return out


@dataclass(frozen=True)
class JoinedWeight:
    """One of the weights that a `Joined` weight is made of.

    Attributes:
        format: of its tensors.
        rows, columns: of its values.
        row, column: where these begin in the whole weight.
        offsets: where its tensors begin in the bytes of the whole weight, in bytes.
    """

    format: Format
    rows: int
    columns: int
    row: int
    column: int
    offsets: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks of all rows."""
        return self.rows * self.columns // self.format.block_length

    def sizes(self) -> list[tuple[torch.dtype, int]]:
        """Returns the dtype and the length of each tensor."""
        return [(torch.uint8, self.blocks * self.format.block_bytes),
                *((qparam.dtype, qparam.length(self.blocks)) for qparam in self.format.qparams)]

    def tensors(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Returns its tensors, which share the bytes of the whole weight, flat uint8."""
        return [reinterpret(data[offset:offset + dtype.itemsize * length], dtype)
                for offset, (dtype, length) in zip(self.offsets, self.sizes())]


class Joined(Composite):
    """A weight of several parts below each other, or of several side by side.

    The bytes of all tensors of all parts follow each other, each at a multiple of `ALIGNED`. A
    block is a row.

    Attributes:
        axis: 0: the parts are rows; 1: columns.
        parts: in order.
    """

    is_sliceable = False
    # without its low ranks: one object for all products, as kernels are kept by their format
    _rest: "Joined | None" = None

    def __init__(self, axis: int, *parts: tuple[Format, int, int]):
        """Makes the format of joined weights.

        Args:
            axis: 0 to join rows, 1 to join columns.
            parts: (format, rows, columns) of each; its rows are whole blocks.
        """
        pieces = "+".join(f"{rows}x{columns}x{packed_format.name}"
                          for packed_format, rows, columns in parts)
        self.name = f"JOINED_{('ROWS', 'COLUMNS')[axis]}_{pieces}"
        self.axis = axis
        placed, offset, start = [], 0, 0
        for part_format, rows, columns in parts:
            place = (start, 0) if axis == 0 else (0, start)
            part = JoinedWeight(part_format, rows, columns, *place, ())
            offsets = []
            for dtype, length in part.sizes():
                offsets.append(offset)
                offset += -(-dtype.itemsize * length // ALIGNED) * ALIGNED
            placed.append(replace(part, offsets=tuple(offsets)))
            start += (rows, columns)[axis]
        self.parts = tuple(placed)
        rows, self.block_length = (start, parts[0][2]) if axis == 0 else (parts[0][1], start)
        self.block_bytes = -(-offset // rows)
        self.is_host_format = all(part.format.is_host_format for part in placed)

    def title(self) -> str:
        return " + ".join(dict.fromkeys(part.format.title() for part in self.parts))

    def formats_within(self) -> Iterable[Format]:
        for part in self.parts:
            yield from part.format.formats_within()

    def without_low_rank(self, tensors: list[torch.Tensor]
                         ) -> tuple[Format, list[torch.Tensor], LowRank | None]:
        data = tensors[0].view(-1)
        rest, low_ranks = [], []
        for part in self.parts:
            packed_format, part_tensors, low_rank = without_low_rank(
                part.format, part.tensors(data))
            # the tensors of a low rank are the last ones
            rest.append(replace(part, format=packed_format,
                                offsets=part.offsets[:len(part_tensors)]))
            if low_rank is not None:
                low_ranks.append((part, low_rank))
        if not low_ranks:
            return self, tensors, None
        if self._rest is None:
            rest_format = object.__new__(Joined)  # for `dequantize_parts` alone
            rest_format.__dict__.update(vars(self), parts=tuple(rest))
            self._rest = rest_format
        return self._rest, tensors, self._joined_low_rank(low_ranks)

    def _joined_low_rank(self, low_ranks: list[tuple[JoinedWeight, LowRank]]) -> LowRank:
        downs, ups, slices, rank = [], [], [], 0
        for part, low_rank in low_ranks:
            down, up = low_rank.down, low_rank.ups[0]
            if self.axis == 1:
                after = self.block_length - part.column - part.columns
                down = torch.nn.functional.pad(down, (part.column, after))
            downs.append(down)
            ups.append(up)
            slices.append(Slice(part.row, part.row + part.rows, rank, rank + len(down)))
            rank += len(down)
        # float32 where some are bfloat16 and some float16: neither holds the numbers of the other
        dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in (*downs, *ups)))
        down = torch.cat([down.to(dtype) for down in downs])
        ups = [up.to(dtype) for up in ups]
        if self.axis == 1:
            return LowRank(down, (torch.cat(ups, 1),), (Slice(0, len(ups[0]), 0, rank),))
        return LowRank(down, tuple(ups), tuple(slices))

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor,
                         first: int, dequantize_into: DequantizeInto) -> torch.Tensor:
        data, rows = tensors[0].view(-1), out.view(-1, self.block_length)
        for part in self.parts:
            start, stop = max(first, part.row), min(first + len(rows), part.row + part.rows)
            if start >= stop:
                continue
            target = rows[start - first:stop - first, part.column:part.column + part.columns]
            values = target if target.is_contiguous() else torch.empty_like(
                target, memory_format=torch.contiguous_format)
            block = (start - part.row) * part.columns // part.format.block_length
            dequantize_into(part.format, part.tensors(data), values, block)
            if values is not target:
                target.copy_(values)
        return out


def without_low_rank(packed_format: Format, tensors: list[torch.Tensor]
                     ) -> tuple[Format, list[torch.Tensor], LowRank | None]:
    """Returns `Composite.without_low_rank`, of other formats the weight itself and None."""
    if isinstance(packed_format, Composite):
        return packed_format.without_low_rank(tensors)
    return packed_format, tensors, None
