"""Assembles a kernel's C++ source from the files in `source/`, for one format and its dtypes.

Each platform has a folder of `source/`: its `lanes.h` defines how neighbouring values are handled
together, and each of its kernels has a file. The folder `formats` is shared.
"""
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..formats import integers
from ..formats._rows import RowFormat
from ..formats.base import Format
from .kernel import Kernel

SOURCES = Path(__file__).with_name("source")
TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
FORMAT_NAMES = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                          "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Codebook4Bit", "INT8"))


class RowKernel(NamedTuple):
    """How `dequantize_rows` reads a family of formats whose block is a row.

    Attributes:
        codes, scales: names of the structures of the source that read them.
        is_rotated: whether groups of columns are rotated.
        minima: name of the structure that reads numbers which are added to groups of columns.
        has_column_scales: whether each column has a factor, the last of the sides.
        has_zeros: whether groups have numbers that are subtracted from the codes, the last side.

    A format with other sides, such as SDNQ's of scales in 16 bits, has no kernel.
    """
    codes: str
    scales: str
    is_rotated: bool = False
    minima: str = "None"
    has_column_scales: bool = False
    has_zeros: bool = False

    @property
    def sides(self) -> int:
        """How many tensors a weight has beside its codes."""
        has_row_scales = "Row" in self.scales or self.scales.startswith("E4M3")
        return (1 + has_row_scales + (self.minima != "None") + self.has_zeros
                + self.has_column_scales)


ROW_FAMILIES = {
    "F8_E4M3": RowKernel("E4M3", "FloatScales"),
    "F8_E5M2": RowKernel("E5M2", "FloatScales"),
    "INT8_GROUPS": RowKernel("SignedBytes", "FloatScales"),
    "MXFP8": RowKernel("E4M3", "Exponents"),
    "NVFP4_ROWS": RowKernel("CodebookNibbles", "E4M3Scales"),
    "NVFP4_LOW": RowKernel("CodebookLowNibbles", "E4M3Scales"),
    "INT8_CONVROT": RowKernel("SignedBytes", "FloatScales", True),
    "INT4_CONVROT": RowKernel("SignedNibbles", "FloatScales", True),
    "W4A8": RowKernel("CodebookLowNibbles", "RowScales", True),
    "W4A8_INTEGERS": RowKernel("CodebookLowNibbles", "RowScales", True),
    "W6A8": RowKernel("SixBits", "RowScales", True),
}
# and those that only a CPU has a kernel for
CPU_ROW_FAMILIES = ROW_FAMILIES | {
    "INT8_SMOOTHED": RowKernel("SignedBytes", "FloatScales", has_column_scales=True),
    "F8_SMOOTHED": RowKernel("E4M3", "FloatScales", has_column_scales=True),
    "NVFP4_SMOOTHED": RowKernel("CodebookNibbles", "E4M3Scales", has_column_scales=True),
    "NVFP4_LOW_SMOOTHED": RowKernel("CodebookLowNibbles", "E4M3Scales", has_column_scales=True),
    "SVDQUANT_NVFP4": RowKernel("CodebookLowNibbles", "E4M3Scales", has_column_scales=True),
    "SVDQUANT_INT4": RowKernel("SignedNibbles", "BFloatRowScales", has_column_scales=True),
    "SVDQUANT_INT4_HALF": RowKernel("SignedNibbles", "HalfRowScales", has_column_scales=True),
    "W4A16": RowKernel("CodebookLowNibbles", "BFloatScales", minima="BFloat"),
    "W4A16_HALF": RowKernel("CodebookLowNibbles", "HalfScales", minima="HalfFloat"),
    "W4A16_FLOAT": RowKernel("CodebookLowNibbles", "FloatScales", minima="Float"),
    "AWQ_INT4": RowKernel("CodebookLowNibbles", "BFloatScales", minima="BFloat"),
    "AWQ_INT4_HALF": RowKernel("CodebookLowNibbles", "HalfScales", minima="HalfFloat"),
    "SDNQ_INT4": RowKernel("NibblesLessEight", "FloatScales"),
    "SDNQ_UINT4": RowKernel("UnsignedNibbles", "FloatScales", minima="Float"),
    "SDNQ_FLOAT4_E2M1FN": RowKernel("CodebookLowNibbles", "FloatScales"),
    "SDNQ_INT8": RowKernel("SignedBytes", "FloatScales"),
    "SDNQ_UINT8": RowKernel("UnsignedBytes", "FloatScales", minima="Float"),
    "SDNQ_FLOAT8_E4M3FN": RowKernel("E4M3", "FloatScales"),
    "NVFP4_QUOTIENT": RowKernel("CodebookLowNibbles", "E4M3Quotients"),
}
for _ending, _number in (("", "BFloat"), ("_HALF", "HalfFloat"), ("_FLOAT", "Float")):
    _scales = f"{_number.replace('HalfFloat', 'Half')}Scales"
    for _bits in integers.BITS:
        CPU_ROW_FAMILIES |= {
            f"INT{_bits}_GROUPED{_ending}": RowKernel("Integers", _scales),
            f"UINT{_bits}_GROUPED{_ending}": RowKernel("Integers", _scales, has_zeros=True)}
    for _bits in (2, 4):
        CPU_ROW_FAMILIES[f"QUANTO_INT{_bits}{_ending}"] = RowKernel(
            "Integers", _scales, minima=_number)


def kernel_source(platform: str, kernel: str, packed_format: type[Format] | None,
                  dtype: torch.dtype, value_dtype: torch.dtype | None = None, **definitions) -> str:
    """Returns C++ that includes no file of ours.

    Args:
        platform: A folder of `source/`.
        kernel: The name of one of its files.
        packed_format: None for a kernel that takes no weight.
        dtype: As in `Kernel`.
        value_dtype: As in `Kernel`.
        definitions: Further constants of the kernel.
    """
    definitions |= {"TYPE": TYPES[dtype], "VALUE_TYPE": TYPES[value_dtype or torch.float32]}
    if packed_format is not None:
        definitions |= {
            "FORMAT": _family_of(packed_format).__name__,
            "BLOCK_LENGTH": packed_format.block_length,
            "BLOCK_BYTES": packed_format.block_bytes,
            "SCALES_APART": int(bool(packed_format.sides)),
        }
    codebook = getattr(packed_format, "codebook", None) or getattr(packed_format, "values", None)
    if codebook:
        definitions["CODEBOOK"] = c_floats(codebook)
    defines = [f"#define {name} {value}" for name, value in definitions.items()]
    texts = [path.read_text(encoding="utf-8")
             for path in source_files(platform, packed_format, kernel)]
    return "\n".join([*defines, *texts])


def row_definitions(packed_format: type[RowFormat]) -> dict[str, int | str]:
    """Returns the constants of `dequantize_rows` for a format that `is_plain_row`."""
    kernel = CPU_ROW_FAMILIES[packed_format.family]
    group = packed_format.group or packed_format.block_length
    definitions = {
        "CODES": kernel.codes, "SCALES": kernel.scales, "BITS": packed_format.bits,
        "COLUMNS": packed_format.block_length, "GROUP": group, "ROTATED": int(kernel.is_rotated),
        "ROOT": f"{group**0.5 if kernel.is_rotated else 1.0}f",
        "LEVEL_GROUP": getattr(packed_format, "level_group", 0), "MINIMA": kernel.minima,
        "HAS_MINIMA": int(kernel.minima != "None"), "HAS_ZEROS": int(kernel.has_zeros),
        "SCALED_COLUMNS": int(kernel.has_column_scales)
    }
    if kernel.codes.startswith("Codebook"):
        base: Any = getattr(packed_format, "base", packed_format)
        numbers = base.code_numbers()
        definitions["CODEBOOK"] = c_floats(numbers.tolist())
    if issubclass(packed_format, integers.Integers):
        definitions["OFFSET"] = packed_format.offset()
        definitions["ZERO_BITS"] = packed_format.zero_bits()
    return definitions


def is_plain_row(packed_format: type[RowFormat]) -> bool:
    """Returns whether the kernel of a format's family reads all that the format has."""
    return (len(packed_format.sides) == CPU_ROW_FAMILIES[packed_format.family].sides
            and getattr(packed_format, "taps", 1) == 1
            and not getattr(packed_format, "rotation", 0))


def row_chunk(packed_format: type[RowFormat]) -> int:
    """Returns how many values a thread of a GPU's `dequantize_rows` writes, or 0 where lengths are
    no multiples of what it handles at a time."""
    definitions = row_definitions(packed_format)
    chunk = 16 if definitions["ROTATED"] else 8
    lengths = definitions["GROUP"], definitions["LEVEL_GROUP"]
    return 0 if lengths[0] % chunk or lengths[1] % 8 else chunk


def _family_of(packed_format: type[Format]) -> type:
    """Returns the class whose name the source has."""
    return next(base for base in packed_format.__mro__ if base.__name__ in FORMAT_NAMES)


def c_floats(numbers: Iterable[float]) -> str:
    """Returns the elements of a C array of floats, in hexadecimal, so that none is rounded."""
    return ", ".join(f"{value.hex()}f"
                     for value in torch.tensor(tuple(numbers), dtype=torch.float32).tolist())


def source_files(platform: str, packed_format: type[Format] | None, kernel: str) -> list[Path]:
    """Returns the files of a kernel's source, in order.

    A family of formats has one file, named like the one in ops/formats. Kernels whose names have
    the same first word may share a header, and those of GPUs one in `gpu`.
    """
    folder, weight_files = SOURCES / platform, []
    if packed_format is not None:
        family = _family_of(packed_format).__module__.rpartition(".")[2]
        weight_files = [SOURCES / "formats" / f"{family}.h", SOURCES / "weight.h"]
    return [
        folder / "lanes.h",
        *weight_files,
        *(SOURCES / "gpu").glob(f"{kernel if platform != 'cpu' else ''}.h"),
        *folder.glob(f"{kernel.partition('_')[0]}.h"),
        *folder.glob(f"{kernel}.*"),
    ]


def block_addresses(packed_format: type[Format], tensors: list[torch.Tensor],
                    first: int = 0) -> tuple[int, int | None]:
    """Returns the address of block `first` and that of its scale, None where blocks hold their
    scales."""
    scales = None
    if packed_format.sides:
        scales = tensors[1].data_ptr() + first * tensors[1].itemsize
    return tensors[0].data_ptr() + first * packed_format.block_bytes, scales


def late_bound_method(kernels: Callable[[], object], name: str) -> Callable[..., None]:
    """Returns a function that calls a method of `kernels()`, which is created on the first call."""
    return lambda *arguments: getattr(kernels(), name)(*arguments)


def dequantize_and_linear(kernels: Callable[[], object],
                          token_limits: Iterable[int]) -> tuple[Kernel, ...]:
    """Returns "dequantize", and "linear" once for each token limit.

    Args:
        kernels: Returns the object whose methods of these names run. Its `linear` takes the limit
            of the variant as its first argument.
        token_limits: The most tokens of each variant of "linear", ascending.
    """
    dtypes, linear = frozenset(TYPES), late_bound_method(kernels, "linear")
    table = [Kernel("dequantize", FORMAT_NAMES, dtypes, late_bound_method(kernels, "dequantize"))]
    min_tokens = 1
    for max_tokens in token_limits:
        table.append(Kernel("linear", FORMAT_NAMES, dtypes, functools.partial(linear, max_tokens),
                            min_tokens, max_tokens))
        min_tokens = max_tokens + 1
    return tuple(table)
