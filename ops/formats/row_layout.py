"""Weights whose block is a row, described as data (`RowLayout`), and one interpreter of them all.

A row of K values is K codes and the numbers that some of its columns, or all of them, share. A
family is what layouts for rows of all lengths have in common.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .base import Format, QParam, Terms
from .bits import (
    bit_planes,
    byte_pairs,
    passes_are_cheap,
    reinterpret,
    select,
    split_bits,
    split_stream,
)
from .rotation import rotate, rotation_signs

# kind of stored numbers -> their dtype; all but "f32" are held as bytes, the last three explained
# by tables
NUMBER_DTYPES = {
    "f32": torch.float32, "f32 bytes": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "e4m3": torch.uint8, "e8m0": torch.uint8, "bytes": torch.uint8}
# bits of a code -> codes that SDNQ packs together
PACK_CODES = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}
COLUMNS_OF_EXAMPLE = 1024
NARROW_COLUMNS, WIDE_COLUMNS = 48, 1280  # about, of examples that kernels are checked with


@dataclass(frozen=True)
class Codes:
    """How the codes of a row are stored, and which numbers they stand for.

    Attributes:
        bits: of a code.
        order: "bytes"; "low first" or "high first", the nibble of a byte; "stream" of bits, the
            lowest first; "packs" of SDNQ, see `split_codes`; "planes", of 6 bits: eight codes are
            four bytes of low nibbles and two of upper bits.
        numbers: of each code; None: the integer less `offset`, or the float of `dtype`.
        offset: what is subtracted from integers.
        dtype: of codes of 8 bits as they are: uint8, int8 or a float8 of torch.
    """
    bits: int = 8
    order: str = "bytes"
    numbers: tuple[float, ...] | None = None
    offset: int = 0
    dtype: torch.dtype = torch.uint8

    def all_numbers(self) -> torch.Tensor:
        """Returns the number of each code, float32 (2**bits,)."""
        if self.numbers is not None:
            return torch.tensor(self.numbers, dtype=torch.float32)
        integers = torch.arange(2**self.bits)
        if self.bits == 8:
            return integers.to(torch.uint8).view(self.dtype).float() - self.offset
        return integers.float() - self.offset


@dataclass(frozen=True)
class Numbers:
    """Stored numbers that several values share: scales, or what is added to values.

    Attributes:
        kind: a key of `NUMBER_DTYPES`. The numbers of "bytes" are in a table of the weight.
        has_factor: whether a factor of all of them, float32 (1,), is stored beside them.
    """
    kind: str = "f32"
    has_factor: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored numbers."""
        return NUMBER_DTYPES[self.kind]

    def qparams(self, name: str, count: int) -> tuple[QParam, ...]:
        """Returns the tensors of a row of `count` numbers, `name` and what explains its numbers."""
        if self.kind == "f32":
            return (QParam(torch.float32, count, name=name),)
        numbers = (QParam(torch.uint8, count * self.dtype.itemsize, name=name),)
        if self.kind == "bytes":
            return *numbers, QParam(torch.float32, 256, True, f"{name}_table")
        return (*numbers, QParam(torch.float32, 1, True, f"{name}_factor")
                ) if self.has_factor else numbers


@dataclass(frozen=True)
class RowLayout:
    """The layout of a row: value = number of a code * scale + minimum, in float32.

    In this order, where a layout has it: the zero of a group is subtracted from its codes; codes
    times scales are rounded to integers (`is_requantized`); groups are rotated, with what is added
    to them; they are multiplied by the scales; the minimum is added; values are rotated
    (`rotates_values`) or multiplied by the factor of their column.

    Attributes:
        columns: values of a row.
        codes: their storage.
        scale: the scales of groups.
        groups: of columns in a row, each of which shares a scale.
        row_scale: "multiply" or "divide": scales are, by a float32 of their row; "" for neither.
        zero_bits: bits of the zero of a group; 0: groups have none.
        minimum: what is added to the values of a group; None: nothing.
        levels: of a group, which codes select in place of a scale; 0: none.
        has_own_numbers: whether the 16 numbers of codes are the weight's own.
        is_requantized: whether codes times scales are rounded to nearest, ties to even, and limited
            to 127 in magnitude; then they are multiplied by the scale of their row.
        rotation: values that are rotated together, 0: none.
        rotation_base: see `rotation_signs`.
        rotates_values: whether values are rotated, rather than codes.
        has_column_scales: whether each column has a factor, float32.
        names_groups: whether columns name their groups, which may be in any order, in int16.
        taps: positions of a convolution's kernel: neighbouring values, of which each has its own
            scales.
        padding: files fill rows and columns up to multiples of it.
        is_host_format: whether it is one of ComfyUI's own, from which weights are packed.
        title: the name for people, where it is not the family's.
    """
    columns: int
    codes: Codes
    scale: Numbers = Numbers()
    groups: int = 1
    row_scale: str = ""
    zero_bits: int = 0
    minimum: Numbers | None = None
    levels: int = 0
    has_own_numbers: bool = False
    is_requantized: bool = False
    rotation: int = 0
    rotation_base: int = 4
    rotates_values: bool = False
    has_column_scales: bool = False
    names_groups: bool = False
    taps: int = 1
    padding: int = 1
    is_host_format: bool = False
    title: str = ""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.groups

    def qparams(self) -> tuple[QParam, ...]:
        """Returns the tensors of a weight beside its codes, in their order.

        | name | numbers |
        |---|---|
        | scale, scale_factor, scale_table | `scale`, or `levels` of each group |
        | row_scale | `row_scale` |
        | zero | the zeros of a row's groups, filled up to whole bytes |
        | minimum, minimum_factor, minimum_table | `minimum` |
        | numbers | the weight's own numbers of codes |
        | column_scale | the factors of columns |
        | group_of_column | the bytes of int16, the group of each column |
        """
        count = self.groups * self.taps
        qparams = self.scale.qparams("scale", count * max(1, self.levels))
        if self.row_scale:
            qparams += (QParam(torch.float32, name="row_scale"),)
        if self.zero_bits:
            qparams += (QParam(torch.uint8, -(-count * self.zero_bits // 8), name="zero"),)
        if self.minimum:
            qparams += self.minimum.qparams("minimum", count)
        if self.has_own_numbers:
            qparams += (QParam(torch.float32, 16, True, "numbers"),)
        if self.has_column_scales:
            qparams += (QParam(torch.float32, self.columns, True, "column_scale"),)
        if self.names_groups:
            nbytes = self.columns * torch.int16.itemsize
            qparams += (QParam(torch.uint8, nbytes, True, "group_of_column"),)
        return qparams


class RowFormat(Format):
    """A block is a row of a weight, which `layout` describes.

    Attributes:
        layout: of the row.
        family: name of the family, the same for rows of all lengths.
        sizes: of the format in its family.
    """
    def __init__(self, family: str, columns: int, *sizes: int):
        written = sizes if sizes != FAMILIES[family].sizes else ()
        self.name = "_".join(map(str, (family, columns, *written)))
        self.family, self.sizes = family, sizes
        self.layout = FAMILIES[family].layout(columns, *sizes)
        self.block_length = columns
        self.block_bytes = columns * self.layout.codes.bits // 8
        self.qparams, self.padding = self.layout.qparams(), self.layout.padding
        self.is_host_format = self.layout.is_host_format

    @property
    def kernel_key(self) -> str:
        """The name without the columns, and without the groups that columns name."""
        family = FAMILIES[self.family]
        is_family = self.layout.names_groups or self.sizes == family.sizes
        return "_".join(map(str, (self.family, *(() if is_family else self.sizes))))

    def title(self) -> str:
        return self.layout.title or self.family

    def kernel_names(self) -> tuple[str, ...]:
        names = (*super().kernel_names(), self.family)
        return names if self.layout.rotation else (*names, "UnrotatedRows")

    def code_numbers(self) -> torch.Tensor:
        """Returns the number of each code, float32 (2**bits,)."""
        return self.layout.codes.all_numbers()

    def number_pairs(self) -> torch.Tensor:
        """Returns the two numbers of each byte of 4-bit codes, float32 in int64 (256,)."""
        return byte_pairs(self.code_numbers(), self.layout.codes.order == "high first")

    def scale_numbers(self) -> torch.Tensor:
        """Returns the scale of each byte of stored scales, float32 (256,)."""
        if self.layout.scale.kind == "e8m0":
            powers = (math.ldexp(1, exponent - 127) for exponent in range(1, 255))
            return torch.tensor([0.0, *powers, math.inf], dtype=torch.float32)
        return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()

    def numbers(self, packed: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of codes, uint8, int8 or float32 of (n, K).

        Those of codes of 8 bits may share the bytes of `packed`, uint8 (n, B).
        """
        codes, device = self.layout.codes, packed.device
        if codes.bits == 4 and (codes.numbers or codes.order == "stream"):
            pairs = select(self.constant("number_pairs", device), packed)
            return pairs.view(torch.float32).view(len(packed), -1)
        if codes.bits == 8:
            if codes.dtype.is_floating_point and device.type == "cuda":
                return packed.view(codes.dtype).float()
            if codes.dtype.is_floating_point or codes.numbers:
                return select(self.constant("code_numbers", device), packed).view(packed.shape)
            # 128 less is the top bit turned, read with a sign
            return (packed ^ 128).view(torch.int8) if codes.offset else packed.view(codes.dtype)
        fields = SPLIT[codes.order](packed, codes.bits)
        if codes.numbers:
            return select(self.constant("code_numbers", device), fields).view(fields.shape)
        if codes.offset:
            fields = fields.view(torch.int8) if fields.dtype == torch.uint8 else fields
            fields.sub_(codes.offset)
        return fields

    def stored(self, numbers: Numbers, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the numbers of the tensor `name` as float32, flat."""
        stored = tensors[name]
        if numbers.kind == "f32":
            return stored
        if numbers.kind == "bytes":
            return select(tensors[f"{name}_table"], stored)
        if numbers.dtype == torch.uint8:
            return select(self.constant("scale_numbers", stored.device), stored)
        values = reinterpret(stored, numbers.dtype).float()
        return values * tensors[f"{name}_factor"] if numbers.has_factor else values

    def terms(self, packed: torch.Tensor, *qparams: torch.Tensor) -> Terms:
        """Returns the terms of rows: codes, uint8 (n, block_bytes), and tensors of `qparams`."""
        layout, count = self.layout, len(packed)
        tensors = {qparam.name: tensor for qparam, tensor in zip(self.qparams, qparams)}
        taps = (layout.taps,) if layout.taps > 1 else ()
        shape, each = (count, layout.groups, -1, *taps), (count, layout.groups, 1, *taps)
        scales = self.stored(layout.scale, "scale", tensors)
        if layout.levels:
            terms = self._selected(packed, scales)
        else:
            zeros = self._zeros(tensors["zero"], count) if layout.zero_bits else None
            added = self.stored(layout.minimum, "minimum", tensors) if layout.minimum else None
            numbers = (select(tensors["numbers"], split_bits(packed, 4, 2)).view(count, -1)
                       if layout.has_own_numbers else self.numbers(packed))
            if layout.names_groups:
                return self._of_named_groups(numbers, zeros, scales.view(count, -1),
                                            tensors["group_of_column"])
            numbers = numbers.view(shape)
            if zeros is not None:
                numbers = numbers.float().sub_(zeros.view(each))
            scales = scales.view(each)
            if layout.is_requantized:
                numbers = (numbers * scales).round_().clamp_(-127, 127)
                scales = tensors["row_scale"].view(-1, 1)
            elif layout.row_scale:
                of_row = tensors["row_scale"].view(-1, 1, 1)
                scales = scales * of_row if layout.row_scale == "multiply" else scales / of_row
            if layout.rotation and not layout.rotates_values:
                return self._rotated(numbers, scales.view(count, 1), added)
            terms = Terms(numbers, scales, None if added is None else -added.view(each))
        if layout.has_column_scales:
            values = (terms.codes.mul_(terms.scales) if terms.codes.is_floating_point()
                      else terms.codes * terms.scales)
            return Terms(values.view(count, -1), tensors["column_scale"])
        if layout.rotates_values and layout.rotation:
            values = torch.empty((count, layout.columns), dtype=torch.float32,
                                 device=packed.device)
            terms.write(values)
            return Terms(self._rotate(values), values.new_full((), layout.rotation**-0.5))
        return terms

    def _selected(self, packed: torch.Tensor, levels: torch.Tensor) -> Terms:
        """Returns the levels that codes select."""
        layout = self.layout
        shape = (len(packed), layout.groups, -1, layout.taps)
        codes = SPLIT[layout.codes.order](packed, layout.codes.bits).view(shape).long()
        levels = levels.view(len(packed), layout.groups, layout.levels, layout.taps)
        values = levels.gather(2, codes)
        return Terms(values, values.new_ones(()))

    def _zeros(self, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """Returns the zeros of some rows, integers (rows, groups)."""
        stored, width = stored.view(rows, -1), self.layout.zero_bits
        if width == 8:
            return stored
        return split_bits(stored, width, 8 // width).view(rows, -1)[:, :self.layout.groups]

    def _of_named_groups(self, numbers: torch.Tensor, zeros: torch.Tensor | None,
                         scales: torch.Tensor, names: torch.Tensor) -> Terms:
        """Returns the terms of columns that name their groups."""
        group_of_column = reinterpret(names, torch.int16).int()
        if zeros is not None:
            numbers = numbers.float().sub_(zeros.index_select(1, group_of_column))
        return Terms(numbers, scales.index_select(1, group_of_column))

    def _rotated(self, numbers: torch.Tensor, scales: torch.Tensor,
                 added: torch.Tensor | None) -> Terms:
        """Returns the terms of numbers that are rotated before they are scaled.

        Their rotation turns integers into sums that float32 holds exactly, so that a value is
        rounded once, whatever the order of the sum.
        """
        layout, root = self.layout, self.layout.rotation**0.5
        signs = rotation_signs(layout.rotation, numbers.device, layout.rotation_base)
        sums = numbers.view(-1, layout.rotation).float() @ signs
        terms = Terms(sums.view(len(scales), -1), scales / root)
        if added is not None:
            added = added.repeat_interleave(layout.group).view(len(scales), -1)
            terms.minima = self._rotate(added) / -root
        return terms

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        return rotate(rows, self.layout.rotation, self.layout.rotation_base)

    def unrotated(self, rows: torch.Tensor) -> torch.Tensor:
        if not (self.layout.rotates_values and self.layout.rotation):
            return rows
        return self._rotate(rows.float()).mul_(self.layout.rotation**-0.5)


INT8_CODES = Codes(dtype=torch.int8)
FAMILIES: dict[str, "RowFamily"] = {}


@dataclass(frozen=True)
class RowFamily:
    """What the layouts of one kind have in common; defining one registers it.

    Attributes:
        name: with which the names of its formats begin.
        layout: Returns the layout of rows of `columns`, and of the sizes.
        sizes: what formats differ in, in the order in which their names have it, as it is where
            they do not.
    """
    name: str
    layout: Callable[..., RowLayout]
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.name in FAMILIES:
            raise TypeError(f"The family {self.name} is defined twice.")
        FAMILIES[self.name] = self

    @functools.cached_property
    def example(self) -> RowLayout:
        """The layout of rows of `COLUMNS_OF_EXAMPLE`."""
        return self.layout(COLUMNS_OF_EXAMPLE, *self.sizes)

    def of_columns(self, columns: int, *sizes: int | None) -> RowFormat:
        """Returns the format of rows of a length.

        Args:
            columns: values in a row, whole groups.
            sizes: the first ones of the sizes; None, or left out: the family's.
        """
        given = [*sizes, *[None] * (len(self.sizes) - len(sizes))]
        return RowFormat.of(self.name, columns, *(
            own if size is None else size for size, own in zip(given, self.sizes)))

    def examples(self, sizes: tuple[int, ...] = (), multiple: int = 1) -> list[RowFormat]:
        """Returns formats of rows of several lengths, odd multiples of the shortest one too.

        Args:
            sizes: of the formats, none: the family's.
            multiple: of which their columns are, besides eight values and whole groups.
        """
        sizes = sizes or self.sizes
        of_sizes = self.layout(8 * math.prod(size for size in sizes if size > 0), *sizes)
        group = of_sizes.group if of_sizes.groups > 1 else of_sizes.taps
        shortest = math.lcm(8, group, of_sizes.rotation or 1, multiple)
        counts = (max(3, NARROW_COLUMNS // shortest | 1), 2 * -(-NARROW_COLUMNS // shortest),
                  WIDE_COLUMNS // shortest + 1 | 1)
        all_sizes = [[groups] for groups in (1, 3, 7)] if of_sizes.names_groups else [sizes] * 3
        return [self.of_columns(count * shortest, *each)
                for count, each in zip(dict.fromkeys(counts), all_sizes)]


def split_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Splits bytes into codes as SDNQ packs them.

    Args:
        packed: uint8 (n, B), B a multiple of the bytes of a pack.
        bits: of a code, 1 to 8.

    Returns:
        uint8 (n, B * 8 / bits), in the order of the values.
    """
    if bits == 8:
        return packed
    if bits == 4:
        words = packed.to(torch.int16)  # one pass over words is cheaper than two over bytes
        return (words | words << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    if not passes_are_cheap(packed.device):
        packed = packed.int()  # some Intel GPUs crash on shifts of bytes
    if bits in (1, 2):
        fields = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).view(len(packed), -1).to(torch.uint8)
    columns = packed.reshape(len(packed), -1, PACK_CODES[bits] * bits // 8).unbind(-1)
    low, high = [byte & (1 << bits) - 1 for byte in columns], [byte >> bits for byte in columns]
    if bits == 3:  # `high` has a second code, and above it two or three bits of the last two codes
        low += [byte & 7 for byte in high]
        first, second, third = (byte >> 6 for byte in columns)
        low += [first | (third & 1) << 2, second | (third & 2) << 1]
    elif bits == 5:
        low += [high[0] | (high[3] & 3) << 3, high[1] | (high[4] & 3) << 3,
                high[2] | (high[3] >> 2) << 4 | (high[4] >> 2) << 3]
    elif bits == 6:
        low.append(high[0] << 4 | high[1] << 2 | high[2])
    else:
        last = high[0] << 6
        for shift, byte in zip(range(5, -1, -1), high[1:]):
            last |= byte << shift
        low.append(last)
    return torch.stack(low, -1).view(len(packed), -1).to(torch.uint8)


def _split_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes of 6 bits: eight are four bytes of low nibbles and two of upper bits."""
    low, upper = packed.view(-1, 6).split([4, 2], 1)
    codes = bit_planes(low, 4).transpose(1, 2).reshape(-1, 4, 4)
    codes.add_(bit_planes(upper.reshape(-1, 4), 2).transpose(1, 2), alpha=16)
    return codes.view(len(packed), -1)


# order of codes -> what splits bytes (n, B) into codes (n, K)
SPLIT = {"packs": split_codes, "stream": split_stream, "planes": _split_planes}
