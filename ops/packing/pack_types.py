"""The types that weights can be packed to, each a row of `TYPES`."""
import math
from dataclasses import dataclass
from typing import Any

import torch

from .. import formats  # noqa: F401  registers the packed formats
from ..formats.base import FORMATS, Format, FormatError, TooLargeError
from ..formats.comfy_quant import (
    F8_E4M3,
    INT4_CONVROT,
    INT8_CONVROT,
    INT8_ROWS,
    MXFP8,
    MXFP8_GROUP,
    NVFP4_GROUP,
    NVFP4_ROWS,
    W4A8,
)
from ..formats.row_layout import COLUMNS_OF_EXAMPLE, RowFamily, RowFormat
from ..quantize.row_source import RowSource
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_tensor import PackedTensor
from .pack_rows import pack_rows
from .pack_tensor import pack_tensor

SAVE, LOAD = "save", "load"  # menus
ROTATIONS = (256, 64, 16)  # columns, the first that divide a row
UNKNOWN_BITS = 16.0  # of a value in a type of the host's, whose layers are saved dequantized


@dataclass(frozen=True)
class PackType:
    """A type of weights: plain, or of values that are packed in blocks.

    Attributes:
        name: for people, in plans and, of most, in files.
        signal_to_error: dB of the weights' power over the error's: the mean over the matrices of
            the demo's model; of Q8_0 and types in blocks of 32, over normally distributed weights.
            Infinite where nothing is lost, or it is not known.
        fallback: the type with which llama.cpp replaces it where its blocks do not divide a row
            (`llama-quant.cpp`, tensor_type_fallback), "" for none.
        menus: where people are offered it. Mixes have the GGUF types that they are offered.
        needs_measurement: whether mixes have it by a measurement only, and none is as good as it.
        dtype: of plain numbers, None where they are packed.
    """

    name: str
    signal_to_error: float = math.inf
    fallback: str = ""
    menus: tuple[str, ...] = (SAVE, LOAD)
    needs_measurement: bool = False
    dtype: torch.dtype | None = None
    is_host_type = False  # one of ComfyUI's own

    @property
    def is_plain(self) -> bool:
        return self.dtype is not None

    @property
    def is_gguf(self) -> bool:
        """Whether weights in GGUF files are packed in it."""
        return self.name in FORMATS and FORMATS[self.name].ggml_type is not None

    @property
    def relative_error(self) -> float:
        """The power of the error over that of the weights."""
        return 10 ** (-self.signal_to_error / 10)

    @property
    def packs_tables(self) -> bool:
        """Whether lookup tables are packed to it: not to NF4, as in Forge's files."""
        return self.is_plain or not FORMATS[self.name].qparams

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a weight of a shape can be packed: whether blocks divide its rows, or
        continue from row to row, as those with separate scales."""
        return self.is_plain or bool(FORMATS[self.name].qparams) or (
            shape[-1] % FORMATS[self.name].block_length == 0)

    def format_of(self, shape: tuple[int, ...]) -> Format:
        """Returns the format of a weight of a shape that it takes."""
        return FORMATS[self.name]

    def bits_per_value(self) -> float:
        """Returns the bits of a value, scales included, UNKNOWN_BITS without a format."""
        if self.dtype is not None:
            return 8.0 * self.dtype.itemsize
        packed = FORMATS.get(self.name)
        return UNKNOWN_BITS if packed is None else (
            8 * (packed.block_bytes + packed.qparam_bytes()) / packed.block_length)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a weight of a shape that it takes, with its scales.

        Parts of a type of ComfyUI's own take up to 4 bytes a row less in a file, and some for its
        settings.
        """
        if self.dtype is not None:
            return math.prod(shape) * self.dtype.itemsize
        return FORMATS[self.name].nbytes(math.prod(shape))

    def pack(self, weight: Any, moments: SecondMoments | None = None,
             importance: torch.Tensor | None = None, is_plain: bool = False) -> Any:
        """Packs a weight, on its device.

        Args:
            weight: (..., K) of any float dtype, of a shape that the type takes; for ComfyUI's own
                types (N, K), or a source of its rows.
            moments: of the layer's inputs. The weight is packed with error feedback too, and that
                is kept if it gives a smaller output error for the tokens held out.
            importance: see `pack_tensor`.
            is_plain: whether it is packed as in a plain conversion: by the format's reference, or
                with scales that just hold the largest values.

        Returns:
            The packed weight, which shows as float32, or plain numbers.

        Raises:
            TooLargeError: A value is too large for the type.
            FormatError: A value is not finite, the type does not take the shape or cannot be
                packed, or the moments are of another number of inputs.
        """
        if self.dtype is None:
            return pack_tensor(weight, FORMATS[self.name], moments, importance, is_plain)
        rounded = weight.to(self.dtype)
        if not rounded.isfinite().all():
            raise TooLargeError(f"The weight holds values that are too large for {self.name}.")
        return rounded


@dataclass(frozen=True, kw_only=True)
class RowPackType(PackType):
    """A type of ComfyUI's own, whose name is ComfyUI's word for it: codes of rows, and scales.

    Attributes:
        family: of its formats.
        shrinks: see `pack_rows`.
        multiple: of which rows and columns are.
        columns: of which columns are.
        rotates: whether groups of `ROTATIONS` columns are rotated; those that none divides are not.
        is_per_tensor: whether one number, float32, is the weight's.
    """

    family: RowFamily
    shrinks: tuple[float, ...]
    multiple: int = 1
    columns: int = 1
    rotates: bool = False
    is_per_tensor: bool = False
    is_host_type = True

    def takes(self, shape: tuple[int, ...]) -> bool:
        if (len(shape) != 2 or 0 in shape or any(size % self.multiple for size in shape)
                or shape[1] % self.columns):
            return False
        return not self.rotates or self.family is INT8_CONVROT or bool(_rotation(shape[1]))

    def format_of(self, shape: tuple[int, ...]) -> RowFormat:
        rotation = _rotation(shape[1]) if self.rotates else 0
        if self.rotates and not rotation:
            return INT8_ROWS.of_columns(shape[1])
        return self.family.of_columns(shape[1], *((rotation,) if rotation else ()))

    def bits_per_value(self, columns: int = COLUMNS_OF_EXAMPLE) -> float:
        """Returns the bits of a value in rows of some columns that it takes, scales included."""
        packed_format = self.format_of((1, columns))
        return 8 * (packed_format.block_bytes + packed_format.qparam_bytes()) / columns

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.ceil(math.prod(shape) * self.bits_per_value(shape[1]) / 8)

    def pack(self, weight: torch.Tensor | RowSource, moments: SecondMoments | None = None,
             importance: torch.Tensor | None = None, is_plain: bool = False) -> PackedTensor:
        shape = weight.shape if isinstance(weight, RowSource) else tuple(weight.shape)
        if not self.takes(shape):
            raise FormatError(f"{self.name} does not hold a weight of shape {shape}.")
        return pack_rows(weight, self.format_of(shape),
                         self.shrinks[:1] if is_plain else self.shrinks, self.is_per_tensor,
                         moments)


def _rotation(columns: int) -> int:
    return next((size for size in ROTATIONS if columns % size == 0), 0)


# A larger scale than needed can be better where the largest levels are far apart.
FOUR_BIT_SHRINKS = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.125, 1.25, 1.375, 1.5)
# So close that each e4m3 between the ends is among them: 0.07 dB, and more would gain nothing.
LEVEL_SHRINKS = (1, *(share / 100 for share in range(60, 100, 5)),
                 *(share / 100 for share in range(106, 160, 6)), 1.6)
# One scale for a row: of normally distributed values the best one holds two thirds of the largest.
FOUR_BIT_ROW_SHRINKS = (1, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66, 0.62, 0.58, 0.54)

# In the order of the menus: those of GGUF, the largest first, NF4, and ComfyUI's own.
TYPES = {pack_type.name: pack_type for pack_type in (
    PackType("Q8_0", 45.4),
    PackType("Q6_K", 35.4, "Q8_0"),
    PackType("Q5_K", 29.4, "Q5_1"),
    PackType("Q4_K", 23.1, "Q5_0"),
    PackType("IQ4_XS", 22.5, "IQ4_NL", needs_measurement=True),
    PackType("Q3_K", 16.8, "IQ4_NL"),
    PackType("Q2_K", 11.7, "IQ4_NL", menus=(SAVE,)),
    PackType("NF4", 21.3),
    RowPackType("int8_convrot", 42.9, family=INT8_CONVROT, shrinks=(1, 0.95, 0.9), rotates=True),
    # the error of float8 hardly depends on the scale: by 0.04 dB at most on the demo's matrices
    RowPackType("float8_e4m3fn", 31.5, family=F8_E4M3, shrinks=(1,), is_per_tensor=True),
    RowPackType("mxfp8", 31.5, family=MXFP8, shrinks=(1, 0.5), multiple=MXFP8_GROUP),
    RowPackType("nvfp4", 21.7, family=NVFP4_ROWS, shrinks=FOUR_BIT_SHRINKS, multiple=NVFP4_GROUP,
                is_per_tensor=True),
    RowPackType("asym_w4a8_int8", 23.0, family=W4A8, shrinks=LEVEL_SHRINKS, multiple=16,
                rotates=True),
    RowPackType("convrot_w4a4", 19.5, family=INT4_CONVROT, shrinks=FOUR_BIT_ROW_SHRINKS, columns=64,
                rotates=True),
    # not offered: fallbacks, and what stays plain
    PackType("Q5_1", 28.2, menus=()),
    PackType("Q5_0", 27.4, menus=()),
    PackType("IQ4_NL", 22.3, menus=()),
    PackType("F32", menus=(), dtype=torch.float32),
    PackType("F16", 75.0, menus=(), dtype=torch.float16),
    PackType("BF16", 75.0, menus=(), dtype=torch.bfloat16),
)}
ROW_TYPES = {name: each for name, each in TYPES.items() if isinstance(each, RowPackType)}
# those of GGUF that people are offered
GGUF_TYPES = [name for name, each in TYPES.items() if each.is_gguf and each.menus]


def pack_type(name: str) -> PackType:
    """Returns the type of a name in `TYPES`, or that of weights in any other format."""
    return TYPES.get(name) or PackType(name, menus=())
