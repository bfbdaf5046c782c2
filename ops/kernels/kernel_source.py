"""Assembles a kernel's C++ source from the files in `source/`, for one format and its dtypes.

Each platform has a folder of `source/`: its `lanes.h` defines how neighbouring values are handled
together, and each of its kernels has a file. The folder `formats` is shared.
"""
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..formats.base import Format
from ..formats.comfyui import SIGNED
from ..formats.row_layout import FAMILIES, Codes, RowFormat, RowLayout
from .kernel import Kernel

SOURCES = Path(__file__).with_name("source")
C_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
# All formats of blocks but the plain ones, F16 and BF16, which a cast dequantises.
FORMAT_NAMES = frozenset((
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q1_0", "Q2_0", "PQ2_0", "TQ1_0", "TQ2_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "MXFP4", "NVFP4", "Codebook4Bit", "INT8"
))


class RowKernel(NamedTuple):
    """How `dequantize_rows` reads a layout.

    Attributes:
        codes, scales: names of the structures of the source that read them.
        minima: name of the structure that reads numbers which are added to groups of columns.
    """
    codes: str
    scales: str
    minima: str = "None"


CODES_OF_DTYPE = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2",
                  torch.int8: "SignedBytes", torch.uint8: "UnsignedBytes"}
SCALES = {"f32": "Float", "f32 bytes": "Float", "bf16": "BFloat", "f16": "Half"}
MINIMA = SCALES | {"f16": "HalfFloat"}
# what the source for GPUs has
GPU_CODES = ("E4M3", "E5M2", "SignedBytes", "CodebookNibbles", "CodebookLowNibbles",
             "SignedNibbles", "SixBits")
GPU_SCALES = ("FloatScales", "Exponents", "E4M3Scales", "RowScales")


def row_kernel(layout: RowLayout) -> RowKernel | None:
    """Returns how the kernel reads a layout, None where it has no structure for a part of it."""
    codes, scales = _code_structure(layout.codes), _scale_structure(layout)
    minima = "None" if layout.minimum is None else MINIMA.get(layout.minimum.kind)
    is_odd = (layout.levels or layout.has_own_numbers or layout.names_groups or layout.taps > 1
              or any(numbers.has_factor for numbers in (layout.scale, layout.minimum) if numbers)
              or (layout.rotation and not layout.rotates_values and layout.minimum))
    return None if is_odd or not (scales and minima) else RowKernel(codes, scales, minima)


def _code_structure(codes: Codes) -> str:
    if codes.order == "planes":
        return "SixBits"
    if codes.order == "stream" or (codes.bits not in (4, 8) and codes.numbers is None):
        return "Integers"
    if codes.bits == 8 and codes.numbers is None:
        return CODES_OF_DTYPE[codes.dtype]
    if codes.bits != 4:
        return "Table"
    if codes.numbers is None:
        return "NibblesLessEight" if codes.offset == 8 else "UnsignedNibbles"
    if codes.order == "high first":
        return "CodebookNibbles"
    return "SignedNibbles" if codes.numbers == SIGNED else "CodebookLowNibbles"


def _scale_structure(layout: RowLayout) -> str | None:
    kind, of_row = layout.scale.kind, layout.row_scale
    if layout.is_requantized:
        return "RowScales"
    if kind == "e8m0":
        return "Exponents"
    if kind == "e4m3":
        return {"multiply": "E4M3Scales", "divide": "E4M3Quotients"}.get(of_row)
    name = SCALES.get(kind)
    return name and f"{name}{'Row' if of_row else ''}Scales"


def _is_for_gpus(layout: RowLayout) -> bool:
    kernel = row_kernel(layout)
    return (kernel is not None and layout.is_host_format and kernel.codes in GPU_CODES
            and kernel.scales in GPU_SCALES and kernel.minima == "None"
            and not layout.has_column_scales)


# families with a kernel of rows; int8 with a scale a row has those of blocks
CPU_ROW_FAMILIES = {
    name: family for name, family in FAMILIES.items()
    if row_kernel(family.example) and not family.example.is_int8}
ROW_FAMILIES = {name: family for name, family in CPU_ROW_FAMILIES.items()
                if _is_for_gpus(family.example)}


def kernel_source(platform: str, kernel: str, packed_format: Format | None,
                  dtype: torch.dtype, **definitions) -> str:
    """Returns C++ that includes no file of ours.

    Args:
        platform: A folder of `source/`.
        kernel: The name of one of its files.
        packed_format: None for a kernel that takes no weight.
        dtype: As in `Kernel`.
        definitions: Further constants of the kernel.
    """
    definitions["TYPE"] = C_TYPES[dtype]
    if packed_format is not None:
        definitions |= {
            "FORMAT": _source_name(packed_format),
            "BLOCK_LENGTH": packed_format.block_length,
            "BLOCK_BYTES": packed_format.block_bytes,
            "SCALES_APART": int(bool(packed_format.qparams)),
        }
    codebook = getattr(packed_format, "codebook", None) or getattr(packed_format, "values", None)
    if codebook:
        definitions["CODEBOOK"] = c_floats(codebook)
    if point_words := getattr(packed_format, "point_words", None):
        definitions["POINTS"] = ", ".join(f"{word & 0xFFFFFFFF:#x}u"
                                          for word in point_words().tolist())
    defines = [f"#define {name} {value}" for name, value in definitions.items()]
    texts = [path.read_text(encoding="utf-8")
             for path in source_files(platform, packed_format, kernel)]
    return "\n".join([*defines, *texts])


@functools.cache
def row_definitions(packed_format: RowFormat) -> dict[str, int | str]:
    """Returns the constants of `dequantize_rows` for a format that `is_plain_row`."""
    layout = packed_format.layout
    codes, kernel = layout.codes, row_kernel(layout)
    assert kernel is not None
    rotated = 0 if layout.rotates_values else layout.rotation
    definitions = {
        "CODES": kernel.codes, "SCALES": kernel.scales, "BITS": codes.bits,
        "COLUMNS": layout.columns, "GROUP": rotated or layout.group,
        "ROTATED": int(bool(rotated)), "ROOT": f"{float(rotated or 1)**0.5}f",
        "LEVEL_GROUP": layout.group if layout.is_requantized else 0, "MINIMA": kernel.minima,
        "HAS_MINIMA": int(kernel.minima != "None"), "HAS_ZEROS": int(bool(layout.zero_bits)),
        "SCALED_COLUMNS": int(layout.has_column_scales),
        "PACKS": int(codes.order == "packs" and codes.bits not in (1, 2)),
        "ROTATED_VALUES": layout.rotation if layout.rotates_values else 0,
        "ROTATION_BASE": layout.rotation_base,
        "ROTATION_FACTOR": c_floats([layout.rotation**-0.5 if layout.rotation else 1]),
    }
    if kernel.codes.startswith("Codebook"):
        definitions["CODEBOOK"] = c_floats(codes.all_numbers().tolist())
    if kernel.codes == "Table":
        definitions["NUMBERS"] = c_floats(codes.all_numbers().tolist())
    if kernel.codes == "Integers":
        definitions |= {"OFFSET": codes.offset, "ZERO_BITS": layout.zero_bits or codes.bits}
    return definitions


@functools.cache
def is_plain_row(packed_format: RowFormat) -> bool:
    """Returns whether the kernel reads all that the format has."""
    return row_kernel(packed_format.layout) is not None


def row_chunk(packed_format: RowFormat) -> int:
    """Returns how many values a thread of a GPU's `dequantize_rows` writes, or 0 where lengths are
    no multiples of what it handles at a time."""
    definitions = row_definitions(packed_format)
    chunk = 16 if definitions["ROTATED"] else 8
    lengths = definitions["GROUP"], definitions["LEVEL_GROUP"]
    return 0 if lengths[0] % chunk or lengths[1] % 8 else chunk


def _source_name(packed_format: Format) -> str:
    """Returns the name that the source has for a format."""
    return next(name for name in packed_format.kernel_names() if name in FORMAT_NAMES)


def c_floats(numbers: Iterable[float]) -> str:
    """Returns the elements of a C array of floats, in hexadecimal, so that none is rounded."""
    return ", ".join(f"{value.hex()}f"
                     for value in torch.tensor(tuple(numbers), dtype=torch.float32).tolist())


def source_files(platform: str, packed_format: Format | None, kernel: str) -> list[Path]:
    """Returns the files of a kernel's source, in order.

    A family of formats has one file, named like the one in ops/formats, and its base may have one.
    Kernels whose names have the same first word may share a header, and those of GPUs one in `gpu`.
    """
    folder, weight_files = SOURCES / platform, []
    if packed_format is not None:
        modules = ["bnb_int8"] if isinstance(packed_format, RowFormat) else dict.fromkeys(
            base.__module__.rpartition(".")[2] for base in reversed(type(packed_format).__mro__))
        weight_files = [path for module in modules
                        if (path := SOURCES / "formats" / f"{module}.h").is_file()]
        weight_files.append(SOURCES / "weight.h")
    return [
        folder / "lanes.h",
        *weight_files,
        *(SOURCES / "gpu").glob(f"{kernel if platform != 'cpu' else ''}.h"),
        *folder.glob(f"{kernel.partition('_')[0]}.h"),
        *folder.glob(f"{kernel}.*"),
    ]


def block_addresses(packed_format: Format, tensors: list[torch.Tensor],
                    first: int = 0) -> tuple[int, int | None]:
    """Returns the address of block `first` and that of its scale, None where blocks hold their
    scales."""
    scales = None
    if packed_format.qparams:
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
    dtypes, linear = frozenset(C_TYPES), late_bound_method(kernels, "linear")
    table = [Kernel("dequantize", FORMAT_NAMES, dtypes, late_bound_method(kernels, "dequantize"))]
    min_tokens = 1
    for max_tokens in token_limits:
        table.append(Kernel("linear", FORMAT_NAMES, dtypes, functools.partial(linear, max_tokens),
                            min_tokens, max_tokens))
        min_tokens = max_tokens + 1
    return tuple(table)
