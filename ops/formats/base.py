"""The base of every packed format: registry, block sizes, shape algebra, chunked dequantising.

A packed format stores a weight as equal blocks of bytes. Each block holds `block_length`
consecutive values of one row. A format is an object of a class in `ops/formats`. One that can be
written has `pack`, the plain arithmetic of its reference, or a `Grid` and `encode`, for the search
of `ops.quantize.grid_search`, or all three.
"""
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..lasting_memory import lasting_memory
from ..stable_names import short_error_name, stable_pickle_name
from . import bits

# Values dequantised at a time on a CPU: the temporaries of one chunk (a few MB) stay in the cache,
# which makes dequantising a large weight about ten times faster than dequantising it whole. With
# smaller chunks the overhead of an operation dominates; larger ones gain little and can make malloc
# return its memory after every chunk.
CPU_CHUNK_VALUES = 1 << 19
# On other devices a launch costs more than a cache miss, so chunks only bound the temporary memory.
DEVICE_CHUNK_VALUES = 1 << 24

FORMATS: dict[str, "Format"] = {}
GGML_FORMATS: dict[int, "Format"] = {}
_CLASSES: dict[str, type["Format"]] = {}  # by their names


@short_error_name
class FormatError(ValueError):
    """A weight cannot be held in the requested format; the message says why."""


@short_error_name
class TooLargeError(FormatError):
    """A weight has values too large for the requested format."""


class QParam(NamedTuple):
    """A tensor of quantisation parameters of a weight, next to its packed bytes, flat.

    Attributes:
        dtype: float32, or uint8 for bytes that a format decodes.
        count: numbers for each block.
        is_shared: whether all blocks have the same numbers, which are stored once.
        name: of the tensor, among those of a weight.
    """

    dtype: torch.dtype
    count: int = 1
    is_shared: bool = False
    name: str = "scale"

    def length(self, blocks: int) -> int:
        """Returns how many numbers a weight of some blocks has."""
        return self.count if self.is_shared else blocks * self.count


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values a format can hold: value = (d * scale) * levels[code] - dmin * minimum.

    A block of `length` values has groups of `group`. `d` and `dmin` belong to the block; `scale`
    and `minimum` are integers of a group, from `scales[0]` to `scales[1]`. Where `scales` is None
    both are 1, and the block is one group.
    """

    length: int
    group: int
    levels: tuple[float, ...]  # ascending
    scales: tuple[int, int] | None = None
    minimum: bool = False
    scale_dtype: torch.dtype = torch.float16

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels == tuple(
            range(round(self.levels[0]), round(self.levels[0]) + len(self.levels))
        )

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative, which can be better than a positive one."""
        return not self.minimum and self.levels[0] != -self.levels[-1]

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.length // self.group

    @property
    def largest(self) -> float:
        """The largest magnitude that every block can hold, whatever its signs."""
        largest_scale = max(map(abs, self.scales or (1,)))
        # a minimum only adds to the magnitude that the levels reach
        largest_level = 1 if self.minimum else min(-self.levels[0], self.levels[-1])
        return torch.finfo(self.scale_dtype).max * largest_scale * largest_level


@dataclasses.dataclass
class Fit:
    """The numbers of n blocks, before they are written as bytes; see `Grid`.

    Attributes:
        codes: uint8 (n, length), indices into the levels.
        d: float32 (n, 1), already rounded as it is stored.
        scales: integers in float32 (n, groups).
        dmin: like `d`; None for grids without a minimum.
        minima: like `scales`; None for grids without a minimum.
    """

    codes: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    @classmethod
    def empty(cls, grid: Grid, blocks: int, device: torch.device) -> "Fit":
        """Returns uninitialised numbers of some blocks."""
        d, scales, dmin, minima = (torch.empty((blocks, count), dtype=torch.float32, device=device)
                                   for count in (1, grid.groups, 1, grid.groups))
        codes = torch.empty((blocks, grid.length), dtype=torch.uint8, device=device)
        return cls(codes, d, scales, *((dmin, minima) if grid.minimum else ()))


@dataclasses.dataclass
class Terms:
    """The terms of n blocks: value = code * scale - minimum, in float32, each step rounded.

    Attributes:
        codes: n * block_length numbers in the order of the values, in any shape and of any strides,
            uint8, int8 or float32; those of float32 may be overwritten.
        scales: float32, broadcast to the shape of the codes.
        minima: like `scales`, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    def write(self, out: torch.Tensor):
        """Writes the values to `out`, contiguous and of any float dtype, rounded once."""
        out = out.view(self.codes.shape)
        if not bits.passes_are_cheap(out.device):
            if self.minima is None:
                torch.mul(self.codes, self.scales, out=out)
            else:
                torch.sub(self.codes * self.scales, self.minima, out=out)
            return
        codes = self.codes.float()
        values = out if out.dtype == torch.float32 else codes
        if self.minima is None:
            torch.mul(codes, self.scales, out=values)
        else:
            torch.sub(codes.mul_(self.scales), self.minima, out=values)
        if values is not out:
            out.copy_(values)


class Format:
    """One way of packing floats into bytes.

    Subclasses set `block_length` (values per block) and `block_bytes` (bytes per block), describe
    the byte layout of a block in their docstring and implement `terms`, in the order of operations
    of ggml's reference, so that the values are bit-exact with it. A format is an object: defining
    such a subclass makes and registers its only one, under the name of the class and under its ggml
    type id where it has one. Of other classes `of` makes one for each tuple of arguments.

    Attributes:
        name: a key of `FORMATS`, the same in every process.
        arguments: what its class made it of.
    """

    name: str
    arguments: tuple
    _constants: dict[tuple, torch.Tensor]
    block_length: int
    block_bytes: int
    ggml_type: int | None = None
    qparams: tuple[QParam, ...] = ()  # tensors with the scales, where the blocks do not hold them
    is_host_format = False  # one of ComfyUI's own, from which weights are packed
    padding = 1  # files fill rows and columns up to multiples of it
    is_sliceable = True  # whether rows that are whole blocks can be taken without dequantising
    plain_dtype: torch.dtype | None = None  # for formats whose bytes are plain numbers
    grid: Grid | None = None  # for formats whose best blocks `ops.quantize.grid_search` finds
    # for formats without a grid: the largest magnitude that every block can hold
    largest = torch.finfo(torch.float16).max

    def __init_subclass__(cls, ggml_type: int | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls
        if "block_bytes" not in cls.__dict__:
            return  # the base of other classes, or one that makes formats of arguments
        cls.name, cls.ggml_type = cls.__name__, ggml_type
        if cls.name in FORMATS:
            raise TypeError(f"The packed format {cls.name} is defined twice.")
        if ggml_type in GGML_FORMATS:
            raise TypeError(f"ggml type {ggml_type} is claimed by {GGML_FORMATS[ggml_type].name}"
                            f" and {cls.name}.")
        packed_format = cls.of()
        if ggml_type is not None:
            GGML_FORMATS[ggml_type] = packed_format

    def __new__(cls, *arguments):
        self = super().__new__(cls)
        self.arguments, self._constants = arguments, {}
        return self

    @classmethod
    def of(cls, *arguments) -> Any:
        """Returns the one format that the class makes of some arguments, and registers it."""
        made = cls(*arguments)
        return FORMATS.setdefault(made.name, made)  # another thread's, where that was first

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return format_of_class, (type(self).__name__, self.arguments)

    def __deepcopy__(self, memo) -> "Format":
        return self

    @property
    def kernel_key(self) -> str:
        """What kernels are compiled and proven for: the name, for rows that without the columns."""
        return self.name

    def title(self) -> str:
        """Returns the name that people see, the same for rows of all lengths."""
        return self.name

    def kernel_names(self) -> tuple[str, ...]:
        """Returns the names under which kernels know the format: its own and those of its bases."""
        return tuple(base.__name__ for base in type(self).__mro__)

    def formats_within(self) -> Iterable["Format"]:
        """Yields the formats that are dequantised; more or others than itself for composites."""
        yield self

    def qparam_bytes(self) -> int:
        """Returns the bytes of a block's own numbers in `qparams`."""
        return sum(qparam.dtype.itemsize * qparam.count
                   for qparam in self.qparams if not qparam.is_shared)

    def nbytes(self, values: int) -> int:
        """Returns the bytes of a weight of some values, with its `qparams`."""
        return (-(-values * self.block_bytes // self.block_length)
                + -(-values // self.block_length) * self.qparam_bytes())

    def terms(self, blocks: torch.Tensor) -> Terms:
        """Returns the terms of some blocks, uint8 (n, block_bytes), whose rows may be strided."""
        raise NotImplementedError

    def dequantize(self, *blocks: torch.Tensor) -> torch.Tensor:
        """Returns the values of some blocks, float32 (n, block_length); see `terms`."""
        count = len(blocks[1]) // self.qparams[0].count if self.qparams else len(blocks[0])
        out = torch.empty((count, self.block_length), dtype=torch.float32, device=blocks[0].device)
        self.write(out, *blocks)
        return out

    def write(self, out: torch.Tensor, *blocks: torch.Tensor):
        """Dequantises into `out`, contiguous, of any float dtype, rounding once from float32."""
        self.terms(*blocks).write(out)

    def pack(self, values: torch.Tensor):
        """Packs values by the plain arithmetic of the format's reference, bit for bit.

        Args:
            values: float32 (n, block_length), contiguous and finite.

        Returns:
            What `dequantize` takes: uint8 (n, block_bytes), or codes and scales.

        Raises:
            FormatError: the reference searches for the best blocks, or there is none.
        """
        raise FormatError(f"{self.name} has no plain arithmetic that packs it.")

    def encode(self, fit: Fit):
        """Writes the numbers of blocks as bytes, in the form that `dequantize` takes."""
        raise NotImplementedError

    def constant(self, name: str, device: torch.device) -> torch.Tensor:
        """Returns a lookup table on `device`, which the method `name` builds on first use."""
        key = (name, device)
        if key not in self._constants:
            with lasting_memory():
                self._constants[key] = getattr(self, name)().to(device)
        return self._constants[key]

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in bytes of a weight of logical `shape`; the last dimension changes.

        Raises:
            FormatError: a row is not whole blocks.
        """
        if not shape or shape[-1] % self.block_length:
            raise FormatError(
                f"{self.name} packs rows in blocks of {self.block_length} values; that does not"
                f" divide the rows of shape {tuple(shape)}."
            )
        return (*shape[:-1], shape[-1] // self.block_length * self.block_bytes)

    def dequantize_into(self, tensors: list[torch.Tensor], out: torch.Tensor,
                        first: int = 0) -> torch.Tensor:
        """Dequantises blocks into `out`, chunk by chunk, rounding once from float32.

        Args:
            tensors: the tensors of a whole weight, its packed bytes (uint8, contiguous, in any
                shape) first.
            out: any float dtype, contiguous, on the same device. Its size is the number of values
                to dequantise.
            first: block to begin at.

        Returns:
            `out`.
        """
        values = out.view(-1)
        step = max(1, chunk_values(out.device) // self.block_length)
        count = -(-len(values) // self.block_length)
        for block in range(0, count, step):
            stop = min(count, block + step)
            part = values[block * self.block_length:stop * self.block_length]
            blocks = self.blocks(tensors, first + block, first + stop)
            if len(part) == (stop - block) * self.block_length:
                self.write(part, *blocks)
            else:
                whole = torch.empty((stop - block) * self.block_length, dtype=out.dtype,
                                    device=out.device)
                self.write(whole, *blocks)
                part.copy_(whole[:len(part)])
        return out

    def blocks(self, tensors: list[torch.Tensor], first: int,
               last: int) -> tuple[torch.Tensor, ...]:
        """Returns what `dequantize` takes for blocks `first` to `last` of a weight."""
        return tensors[0].view(-1, self.block_bytes)[first:last], *(
            tensor if qparam.is_shared else tensor[first * qparam.count:last * qparam.count]
            for tensor, qparam in zip(tensors[1:], self.qparams))

    def unrotated(self, rows: torch.Tensor) -> torch.Tensor:
        """Brings rows (n, K) from the basis of the codes into that of the values.

        Only formats whose codes are rotated change them. The result may have another float dtype.
        """
        return rows

    def rows(self, tensors: list[torch.Tensor], columns: int, index) -> list[torch.Tensor]:
        """Returns the tensors of some rows of a weight whose rows are whole blocks.

        Args:
            tensors: of the weight.
            columns: values in a row.
            index: a slice, or ids of rows.
        """
        blocks = columns // self.block_length
        return [tensors[0].view(-1, columns * self.block_bytes // self.block_length)[index], *(
            tensor if qparam.is_shared else tensor.view(-1, blocks * qparam.count)[index].flatten()
            for tensor, qparam in zip(tensors[1:], self.qparams))]


@stable_pickle_name
def format_of_class(name: str, arguments: tuple) -> "Format":
    """Returns a format from a pickle; see `Format.of`."""
    return _CLASSES[name].of(*arguments)


def chunk_values(device: torch.device) -> int:
    """Returns how many values are dequantised at a time on a device."""
    return CPU_CHUNK_VALUES if device.type == "cpu" else DEVICE_CHUNK_VALUES


def dequantize_by_reference(packed_format: Format, tensors: list[torch.Tensor],
                            out: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Runs `Format.dequantize_into` of a format; a kernel's function has the same arguments."""
    return packed_format.dequantize_into(tensors, out, first)


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """Returns 1 / scales, and 0 where that is infinite: for 0 and the smallest float32 numbers."""
    return torch.nan_to_num(1 / scales, nan=torch.nan, posinf=0, neginf=0)


def powers_of_two(peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the power of two that scales each number of `peaks` to about 1, and its inverse.

    Products with them are exact. They are limited to 2**-126 to 2**126, so that subnormal numbers
    are scaled to about 2**-23 at least.

    Args:
        peaks: float32, finite, none below 0.
    """
    exponents = (peaks.view(torch.int32) >> 23).clamp_(1, 253)
    return (254 - exponents << 23).view(torch.float32), (exponents << 23).view(torch.float32)


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """Rounds float32 values to int8, halves away from zero, as C's roundf. Overwrites `values`."""
    # the largest float below a half: adding a half would round the float below a half to 1
    values += torch.copysign(torch.tensor(0.49999997, dtype=torch.float32, device=values.device),
                             values)
    return values.to(torch.int8)


def peaks(values: torch.Tensor) -> torch.Tensor:
    """Returns the value of largest magnitude of each row, signed, (n, 1); of ties the first."""
    return values.gather(-1, values.abs().argmax(-1, keepdim=True))
