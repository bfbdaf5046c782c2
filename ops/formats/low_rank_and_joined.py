"""Formats of weights that are made of weights in other formats.

`AddedLowRank` is a weight plus the product of two factors, as SVDQuant and SDNQ store it. `Scaled`
is a weight times numbers that its file has beside it. `Joined` is a weight whose rows or columns
come from several weights, such as the q, k and v of a fused layer. All are dequantised by the
kernels of the formats within, and a product may take the low rank as a branch (`without_low_rank`).
"""
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..layers.low_rank import LowRank, Slice
from .base import Format, Side, chunk_values, define, dequantize_by_reference
from .bits import reinterpret

# dequantises as `Format.dequantize_into` does, the format being the first argument
DequantizeInto = Callable[..., torch.Tensor]
FACTOR_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ALIGNED = 64  # bytes, for the tensors of a part


class Composite(Format):
    """The base of formats that are made of others."""

    @classmethod
    def dequantize_parts(cls, tensors: list[torch.Tensor], out: torch.Tensor,
                         value_dtype: torch.dtype | None, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:
        """Dequantises blocks as `Format.dequantize_into` does, each part by a given function."""
        raise NotImplementedError

    @classmethod
    def without_low_rank(cls, tensors: list[torch.Tensor]
                         ) -> tuple[type[Format], list[torch.Tensor], LowRank | None]:
        """Splits a weight into what has to be dequantised and what a product takes as a branch.

        Args:
            tensors: of the whole weight.

        Returns:
            The format and the tensors of the rest, and the low rank in the dtypes of its factors,
            or None.
        """
        raise NotImplementedError

    @classmethod
    def dequantize_into(cls, tensors: list[torch.Tensor], out: torch.Tensor,
                        value_dtype: torch.dtype | None = None, first: int = 0) -> torch.Tensor:
        return cls.dequantize_parts(tensors, out, value_dtype, first, dequantize_by_reference)


class AddedLowRank(Composite):
    """value = value of `base` + (up down) * of_row * of_column, in float32, rounded once.

    The tensors are those of `base`, then

    | tensor    | dtype, shape    | meaning                                                     |
    |-----------|-----------------|-------------------------------------------------------------|
    | up        | uint8           | bytes of (rows, rank) of the dtype in the format's name     |
    | down      | uint8           | bytes of (rank, K), in the basis of the codes if these are  |
    |           |                 | rotated                                                     |
    | of_row    | float32 (rows,) | only where `over` has `is_scaled`: a factor of each row     |
    | of_column | float32 (K,)    | likewise, of each column                                    |

    Attributes:
        base: whose block is a row.
        rank: of the product.
        up_dtype, down_dtype: of the factors.
    """

    base: type[Format]
    rank: int
    up_dtype: torch.dtype
    down_dtype: torch.dtype

    @classmethod
    def over(cls, base: type[Format], rank: int, up_dtype: torch.dtype,
             down_dtype: torch.dtype, is_scaled: bool = False) -> type["AddedLowRank"]:
        """Returns the format of a weight in `base` with a low rank.

        Args:
            base: whose block is a row.
            rank: of the product.
            up_dtype, down_dtype: of the factors.
            is_scaled: whether rows and columns have factors.
        """
        names = {dtype: name for name, dtype in FACTOR_DTYPES.items()}
        mark = "S" if is_scaled else ""
        name = f"LOWRANK_{rank}{mark}_{names[up_dtype]}_{names[down_dtype]}_{base.__name__}"
        down_bytes = rank * base.block_length * down_dtype.itemsize
        sides = (*base.sides, Side(torch.uint8, rank * up_dtype.itemsize, name="up"),
                 Side(torch.uint8, down_bytes, True, "down"))
        if is_scaled:
            sides += (Side(torch.float32, name="of_row"),
                      Side(torch.float32, base.block_length, True, "of_column"))
        return define(name, cls, lambda: {
            "base": base, "rank": rank, "up_dtype": up_dtype, "down_dtype": down_dtype,
            "block_length": base.block_length, "block_bytes": base.block_bytes,
            "sides": sides, "padding": base.padding, "of_host": base.of_host})

    @classmethod
    def title(cls) -> str:
        return f"{cls.base.title()}, rank {cls.rank}"

    @classmethod
    def formats_within(cls) -> Iterable[type[Format]]:
        yield cls.base

    @classmethod
    def factors(cls, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns up (rows, rank) and down (rank, K), the latter in the basis of the input."""
        up, down, *scales = tensors[1 + len(cls.base.sides):]
        up = reinterpret(up, cls.up_dtype).view(-1, cls.rank)
        down = cls.base.unrotated(reinterpret(down, cls.down_dtype).view(cls.rank, -1))
        if scales:
            return up * scales[0].unsqueeze(1), down * scales[1]
        return up, down

    @classmethod
    def without_low_rank(cls, tensors: list[torch.Tensor]
                         ) -> tuple[type[Format], list[torch.Tensor], LowRank | None]:
        up, down = cls.factors(tensors)
        low_rank = LowRank(down, (up,), (Slice(0, len(up), 0, cls.rank),))
        return cls.base, tensors[:1 + len(cls.base.sides)], low_rank

    @classmethod
    def dequantize_parts(cls, tensors: list[torch.Tensor], out: torch.Tensor,
                         value_dtype: torch.dtype | None, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:
        up, down = (factor.float() for factor in cls.factors(tensors))

        def dequantize(values: torch.Tensor, row: int):
            dequantize_into(cls.base, tensors[:1 + len(cls.base.sides)], values, None, row)
            values.addmm_(up[row:row + len(values)], down)

        return _in_float(out.view(-1, cls.block_length), value_dtype, first, dequantize, out)


class Scaled(Composite):
    """value = value of `base` * of_row * of_column, in float32, rounded once.

    A block is a row. The tensors are those of `base`, then

    | tensor    | dtype, shape    | meaning                                       |
    |-----------|-----------------|-----------------------------------------------|
    | of_row    | float32 (rows,) | a factor of each row                          |
    | of_column | float32 (K,)    | of each column, only where `over` has columns |

    Attributes:
        base: whose blocks divide a row.
        by_column: whether columns have factors.
    """

    base: type[Format]
    by_column: bool

    @classmethod
    def over(cls, base: type[Format], columns: int, by_column: bool) -> type["Scaled"]:
        """Returns the format of a weight in `base` with factors.

        Args:
            base: whose blocks divide a row.
            columns: K.
            by_column: whether columns have factors.
        """
        blocks = columns // base.block_length
        sides = *(side if side.is_shared else side._replace(count=side.count * blocks)
                  for side in base.sides), Side(torch.float32, name="of_row")
        if by_column:
            sides += (Side(torch.float32, columns, True, "of_column"),)
        name = f"SCALED{'C' if by_column else ''}_{columns}_{base.__name__}"
        return define(name, cls, lambda: {
            "base": base, "by_column": by_column, "block_length": columns,
            "block_bytes": blocks * base.block_bytes, "sides": sides, "of_host": base.of_host})

    @classmethod
    def title(cls) -> str:
        return f"{cls.base.title()}, scaled"

    @classmethod
    def formats_within(cls) -> Iterable[type[Format]]:
        yield cls.base

    @classmethod
    def without_low_rank(cls, tensors: list[torch.Tensor]
                         ) -> tuple[type[Format], list[torch.Tensor], LowRank | None]:
        return cls, tensors, None

    @classmethod
    def dequantize_parts(cls, tensors: list[torch.Tensor], out: torch.Tensor,
                         value_dtype: torch.dtype | None, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:
        count = 1 + len(cls.base.sides)
        of_row, *of_column = tensors[count:]

        def dequantize(values: torch.Tensor, row: int):
            block = row * cls.block_length // cls.base.block_length
            dequantize_into(cls.base, tensors[:count], values, None, block)
            values *= of_row[row:row + len(values)].unsqueeze(1)
            if of_column:
                values *= of_column[0]

        return _in_float(out.view(-1, cls.block_length), value_dtype, first, dequantize, out)


def _in_float(rows: torch.Tensor, value_dtype: torch.dtype | None, first: int,
              compute: Callable[[torch.Tensor, int], None], out: torch.Tensor) -> torch.Tensor:
    """Fills rows with values that are computed in float32, some rows at a time.

    Args:
        rows: of the result.
        value_dtype: dtype the values are first rounded to, or None.
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
        if value_dtype not in (None, torch.float32):
            values = values.to(value_dtype)
        if values is not part:
            part.copy_(values)
    return out


@dataclass(frozen=True)
class Part:
    """One of the weights that a `Joined` weight is made of.

    Attributes:
        format: of its tensors.
        rows, columns: of its values.
        row, column: where these begin in the whole weight.
        offsets: where its tensors begin in the bytes of the whole weight, in bytes.
    """

    format: type[Format]
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
                *((side.dtype, side.length(self.blocks)) for side in self.format.sides)]

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
    axis: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, axis: int, parts: Sequence[tuple[type[Format], int, int]]) -> type["Joined"]:
        """Returns the format of joined weights.

        Args:
            axis: 0 to join rows, 1 to join columns.
            parts: (format, rows, columns) of each; its rows are whole blocks.
        """
        pieces = "+".join(f"{rows}x{columns}x{packed_format.__name__}"
                          for packed_format, rows, columns in parts)
        name = f"JOINED_{('ROWS', 'COLUMNS')[axis]}_{pieces}"
        return define(name, cls, lambda: cls._attributes(axis, parts))

    @classmethod
    def _attributes(cls, axis: int, parts: Sequence[tuple[type[Format], int, int]]) -> dict:
        placed, offset, start = [], 0, 0
        for part_format, rows, columns in parts:
            place = (start, 0) if axis == 0 else (0, start)
            part = Part(part_format, rows, columns, *place, ())
            offsets = []
            for dtype, length in part.sizes():
                offsets.append(offset)
                offset += -(-dtype.itemsize * length // ALIGNED) * ALIGNED
            placed.append(Part(part_format, rows, columns, *place, tuple(offsets)))
            start += (rows, columns)[axis]
        rows = start if axis == 0 else parts[0][1]
        columns = start if axis == 1 else parts[0][2]
        return {"axis": axis, "parts": tuple(placed), "block_length": columns,
                "block_bytes": -(-offset // rows),
                "of_host": all(part_format.of_host for part_format, *_ in parts)}

    @classmethod
    def title(cls) -> str:
        return " + ".join(dict.fromkeys(part.format.title() for part in cls.parts))

    @classmethod
    def formats_within(cls) -> Iterable[type[Format]]:
        for part in cls.parts:
            yield from part.format.formats_within()

    @classmethod
    def without_low_rank(cls, tensors: list[torch.Tensor]
                         ) -> tuple[type[Format], list[torch.Tensor], LowRank | None]:
        data = tensors[0].view(-1)
        rest, low_ranks = [], []
        for part in cls.parts:
            packed_format, part_tensors, low_rank = without_low_rank(
                part.format, part.tensors(data))
            # the tensors of a low rank are the last ones
            rest.append(Part(packed_format, part.rows, part.columns, part.row, part.column,
                             part.offsets[:len(part_tensors)]))
            if low_rank is not None:
                low_ranks.append((part, low_rank))
        if not low_ranks:
            return cls, tensors, None
        name = f"{cls.__name__}_WITHOUT_LOW_RANK"
        packed_format = define(name, Joined, lambda: {
            "axis": cls.axis, "parts": tuple(rest), "block_length": cls.block_length,
            "block_bytes": cls.block_bytes, "of_host": cls.of_host})
        return packed_format, tensors, cls._joined_low_rank(low_ranks)

    @classmethod
    def _joined_low_rank(cls, low_ranks: list[tuple[Part, LowRank]]) -> LowRank:
        downs, ups, slices, rank = [], [], [], 0
        for part, low_rank in low_ranks:
            down, up = low_rank.down, low_rank.ups[0]
            if cls.axis == 1:
                after = cls.block_length - part.column - part.columns
                down = torch.nn.functional.pad(down, (part.column, after))
            downs.append(down)
            ups.append(up)
            slices.append(Slice(part.row, part.row + part.rows, rank, rank + len(down)))
            rank += len(down)
        # float32 where some are bfloat16 and some float16: neither holds the numbers of the other
        dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in (*downs, *ups)))
        down = torch.cat([down.to(dtype) for down in downs])
        ups = [up.to(dtype) for up in ups]
        if cls.axis == 1:
            return LowRank(down, (torch.cat(ups, 1),), (Slice(0, len(ups[0]), 0, rank),))
        return LowRank(down, tuple(ups), tuple(slices))

    @classmethod
    def dequantize_parts(cls, tensors: list[torch.Tensor], out: torch.Tensor,
                         value_dtype: torch.dtype | None, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:
        data, rows = tensors[0].view(-1), out.view(-1, cls.block_length)
        for part in cls.parts:
            start, stop = max(first, part.row), min(first + len(rows), part.row + part.rows)
            if start >= stop:
                continue
            target = rows[start - first:stop - first, part.column:part.column + part.columns]
            values = target if target.is_contiguous() else torch.empty_like(
                target, memory_format=torch.contiguous_format)
            block = (start - part.row) * part.columns // part.format.block_length
            dequantize_into(part.format, part.tensors(data), values, value_dtype, block)
            if values is not target:
                target.copy_(values)
        return out


def without_low_rank(packed_format: type[Format], tensors: list[torch.Tensor]
                     ) -> tuple[type[Format], list[torch.Tensor], LowRank | None]:
    """Returns `Composite.without_low_rank`, of other formats the weight itself and None."""
    if issubclass(packed_format, Composite):
        return packed_format.without_low_rank(tensors)
    return packed_format, tensors, None
