"""Assembles a kernel's C++ source from the files in `source/`, for one format and its dtypes.

Each platform has a folder of `source/`: its `lanes.h` defines how neighbouring values are handled
together, and each of its kernels has a file. The folder `formats` is shared.
"""
import ctypes
import functools
import struct
from collections.abc import Callable, Iterable
from ctypes import c_int, c_void_p
from pathlib import Path

import torch

from ..formats.base import Format
from ..formats.row_layout import Codes, Numbers, RowFormat, RowLayout
from ..stochastic_rounding import LEAST_NORMAL, MIX, NOISE
from .int8_codes import LARGEST_CODE, TINY
from .kernel import Kernel, block_length

SOURCES = Path(__file__).with_name("source")
CHUNK = 8  # values that a thread of a GPU handles at a time, LANES of its source
TILE_THREADS, MIN_TILE = 256, 256  # of a block of threads, and columns that it takes at least
C_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
# All formats of blocks but the plain ones, F16 and BF16, which a cast dequantises.
FORMAT_NAMES = frozenset((
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q1_0", "Q2_0", "PQ2_0", "TQ1_0", "TQ2_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "MXFP4", "NVFP4", "Codebook4Bit"
))


# names of `Format.kernel_names`: what "dequantize" takes, and what products take too
DEQUANTIZED = FORMAT_NAMES | {"RowFormat"}
MULTIPLIED = FORMAT_NAMES | {"UnrotatedRows"}
PLAIN = frozenset(["F16"])  # plain formats that products take too
CODES = {"LARGEST_CODE": f"{LARGEST_CODE}.0f", "TINY": f"{TINY}f"}  # constants of int8 codes
# constants of "add_rounded": see ops/stochastic_rounding.py; the least number by its bits
DITHER = {"MIX": f"{MIX & 0xFFFFFFFF}u", "NOISE": f"{NOISE.hex()}f",
          "LEAST_NORMAL": hex(struct.unpack("<I", struct.pack("<f", LEAST_NORMAL))[0])}
# order of codes, or storage of numbers -> its name in source/formats/rows.h
ORDERS = {"high first": "HIGH_FIRST", "planes": "PLANES"}
NUMBERS = {"f32": "Float", "f32 bytes": "Float", "bf16": "BFloat", "f16": "HalfFloat",
           "e4m3": "E4M3", "e8m0": "E8M0", "bytes": "Bytes256"}
FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
ROW_SCALES = {"": 0, "multiply": "MULTIPLY", "divide": "DIVIDE"}
# fields of `Weight` in source/formats/rows.h -> the tensors of a weight that they may be
ROW_TENSORS = {
    "codes": ("codes",), "scales": ("scale",), "zeros": ("zero",), "minima": ("minimum",),
    "group_of_column": ("group_of_column",), "explained_scales": ("scale_factor", "scale_table"),
    "row_scales": ("row_scale",), "explained_minima": ("minimum_factor", "minimum_table"),
    "numbers": ("numbers",), "column_scales": ("column_scale",)}


# kernels for CPUs -> the headers that they share with others, in order
HEADERS = {
    "dequantize_rows": ("rotation.h",), "int8_rows": ("int8.h",), "int8_tokens": ("int8.h",),
    "pack_blocks": ("pack.h", "pack_grid.h"),
    "pack_columns": ("pack.h", "pack_grid.h", "pack_columns.h"),
    "pack_rows": ("rotation.h", "pack.h", "pack_codes.h"),
    "pack_row_columns": ("rotation.h", "pack.h", "pack_codes.h", "pack_columns.h")}


class BlockWeight(ctypes.Structure):
    """`Weight` of source/weight.h."""
    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("columns", c_int)]


class RowWeight(ctypes.Structure):
    """`Weight` of source/formats/rows.h."""
    _fields_ = [*((name, c_void_p) for name in ROW_TENSORS), ("columns", c_int), ("groups", c_int)]


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
    definitions |= {"TYPE": C_TYPES[dtype], **format_definitions(platform, packed_format)}
    defines = [f"#define {name} {value}" for name, value in definitions.items()]
    texts = [path.read_text(encoding="utf-8")
             for path in source_files(platform, packed_format, kernel)]
    return "\n".join([*defines, *texts])


def format_definitions(platform: str, packed_format: Format | None) -> dict[str, int | str]:
    """Returns the constants of a format in the source of a kernel, none without a format."""
    if packed_format is None:
        return {}
    if isinstance(packed_format, RowFormat):
        tile = zip(("WIDTH", "HEIGHT", "CHUNKS"), _tile(packed_format.layout))
        return {**row_definitions(packed_format), **(dict(tile) if platform != "cpu" else {})}
    length = block_length(packed_format)
    definitions: dict[str, int | str] = {
        "FORMAT": next(name for name in packed_format.kernel_names()
                       if name in FORMAT_NAMES | PLAIN),
        "BLOCK_LENGTH": length,
        "BLOCK_BYTES": packed_format.block_bytes * length // packed_format.block_length,
        "SCALES_APART": int(bool(packed_format.qparams)),
    }
    if codebook := getattr(packed_format, "codebook", getattr(packed_format, "values", None)):
        definitions["CODEBOOK"] = c_floats(codebook)
    if point_words := getattr(packed_format, "point_words", None):
        definitions["POINTS"] = ", ".join(f"{word & 0xFFFFFFFF:#x}u"
                                          for word in point_words().tolist())
    return definitions


def row_definitions(packed_format: RowFormat) -> dict[str, int | str]:
    """Returns the constants of source/formats/rows.h, the same for rows of all lengths."""
    layout, rotation = packed_format.layout, packed_format.layout.rotation
    return {
        "BITS": layout.codes.bits,
        "ORDER": _order(layout.codes),
        **_numbers_of_codes(layout.codes),
        "HAS_OWN_NUMBERS": int(layout.has_own_numbers),
        "GROUP": scale_group(layout),
        "TAPS": layout.taps,
        "IS_ORDERED": int(layout.names_groups),
        "LEVELS": layout.levels,
        "SCALE": _stored_numbers(layout.scale),
        "ROW_SCALE": 0 if layout.is_requantized else ROW_SCALES[layout.row_scale],
        "ZERO_BITS": layout.zero_bits,
        "MINIMUM": _stored_numbers(layout.minimum) if layout.minimum else "None",
        "HAS_MINIMUM": int(layout.minimum is not None),
        "IS_REQUANTIZED": int(layout.is_requantized),
        "HAS_COLUMN_SCALES": int(layout.has_column_scales),
        "ROTATION": rotation,
        "ROTATION_BASE": layout.rotation_base,
        "ROTATES_CODES": int(rotation > 0 and not layout.rotates_values),
        "ROOT": c_floats([max(1, rotation)**0.5]),
        "ROTATION_FACTOR": c_floats([max(1, rotation)**-0.5]),
    }


def scale_group(layout: RowLayout) -> int:
    """Returns how many neighbouring values share a scale, apart from those of kernel positions; 0:
    those of a row, or of columns that name their groups."""
    return 0 if layout.groups == 1 or layout.names_groups else layout.group


def _order(codes: Codes) -> str:
    if codes.order == "packs" and codes.bits not in (1, 2, 4, 8):
        return "PACKS"
    return ORDERS.get(codes.order, "LOW_FIRST" if codes.bits == 4 else "STREAM")


def _numbers_of_codes(codes: Codes) -> dict[str, int | str]:
    count = 1 << codes.bits
    definitions: dict[str, int | str] = {
        "IS_SIGNED": int(codes.dtype == torch.int8), "OFFSET": codes.offset}
    if codes.numbers is None:
        return definitions | ({"FLOAT8": FLOAT8[codes.dtype]} if codes.dtype in FLOAT8 else {})
    if codes.numbers == (*range(count // 2), *range(-count // 2, 0)):
        return definitions | {"IS_SIGNED": 1}
    lowest = codes.numbers[0]
    if codes.numbers == tuple(lowest + step for step in range(count)) and lowest == int(lowest):
        return definitions | {"OFFSET": -int(lowest)}
    return definitions | {"CODEBOOK" if count == 16 else "NUMBERS": c_floats(codes.numbers)}


def _stored_numbers(numbers: Numbers) -> str:
    name = NUMBERS[numbers.kind]
    return f"{name}TimesFactor" if numbers.has_factor else name


def weight_argument(packed_format: Format, tensors: list[torch.Tensor], columns: int,
                    first: int = 0) -> BlockWeight | RowWeight:
    """Returns a weight as kernels take it. The tensors must stay where they are meanwhile.

    Args:
        packed_format: of the weight.
        tensors: of the weight.
        columns: of a row.
        first: the block with which it begins.
    """
    addresses = [None if field is None else tensors[field[0]].data_ptr() + first * field[1]
                 for field in _fields(packed_format)]
    if isinstance(packed_format, RowFormat):
        return RowWeight(*addresses, columns, packed_format.layout.groups)
    return BlockWeight(*addresses, columns)


@functools.cache
def _fields(packed_format: Format) -> tuple[tuple[int, int] | None, ...]:
    """Returns, for each address that kernels take of a weight, the index of its tensor and the
    bytes that a block has there, 0 for numbers that all blocks share; None where it has none."""
    found = {"codes": (0, packed_format.block_bytes)}
    for index, qparam in enumerate(packed_format.qparams, 1):
        nbytes = 0 if qparam.is_shared else qparam.count * qparam.dtype.itemsize
        found[qparam.name] = index, nbytes
    if not isinstance(packed_format, RowFormat):
        return found["codes"], found.get("scale")
    return tuple(next((found[name] for name in names if name in found), None)
                 for names in ROW_TENSORS.values())


def row_grid(packed_format: RowFormat, rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns how many blocks of threads of a GPU write some rows, and how many threads a block
    has, both along a row and across rows."""
    width, height, chunks = _tile_of(packed_format)
    tile = width * chunks * CHUNK
    return (-(-packed_format.block_length // tile), -(-rows // height)), (width, height)


@functools.cache
def _tile_of(packed_format: RowFormat) -> tuple[int, int, int]:
    return _tile(packed_format.layout)


def _tile(layout: RowLayout) -> tuple[int, int, int]:
    """Returns how many threads of a block write a row, how many rows a block writes, and how many
    times `CHUNK` values a thread of it writes: together whole rotations."""
    vectors = max(layout.rotation, MIN_TILE) // CHUNK
    width = min(vectors, TILE_THREADS)
    return width, TILE_THREADS // width, vectors // width


def c_floats(numbers: Iterable[float]) -> str:
    """Returns the elements of a C array of floats, in hexadecimal, so that none is rounded."""
    return ", ".join(f"{value.hex()}f"
                     for value in torch.tensor(tuple(numbers), dtype=torch.float32).tolist())


def source_files(platform: str, packed_format: Format | None, kernel: str) -> list[Path]:
    """Returns the files of a kernel's source, in order.

    Kernels of GPUs may share a header in `gpu`.
    """
    folder, weight_files = SOURCES / platform, format_files(packed_format)
    return [
        folder / "lanes.h",
        *weight_files,
        *(SOURCES / "gpu").glob(f"{kernel if platform != 'cpu' else ''}.h"),
        *folder.glob("parallel.h"),
        *(folder / name for name in HEADERS.get(kernel, ()) if platform == "cpu"),
        *folder.glob(f"{kernel}.[!h]*"),
    ]


def format_files(packed_format: Format | None) -> list[Path]:
    """Returns the files that know a format, in order.

    A family of formats has one file, named like the one in ops/formats, and its base may have one.
    """
    if packed_format is None:
        return []
    if isinstance(packed_format, RowFormat):
        return [SOURCES / "formats" / "rows.h"]
    modules = dict.fromkeys(
        base.__module__.rpartition(".")[2] for base in reversed(type(packed_format).__mro__))
    files = (SOURCES / "formats" / f"{module}.h" for module in modules)
    return [*filter(Path.is_file, files), SOURCES / "weight.h"]


def made_of(platform: str, capability: str, packed_format: Format | None) -> list[str | Path]:
    """Returns texts and files that differ wherever the sources of kernels for a case do."""
    folder, grid = SOURCES / platform, packed_format and packed_format.grid
    constants = sorted(format_definitions(platform, packed_format).items())
    shared = sorted((SOURCES / "gpu").glob("*")) if platform != "cpu" else []
    return [f"{constants} {grid} {DITHER} {LARGEST_CODE} {TINY}", *format_files(packed_format),
            *shared, *sorted(folder.glob("*.h")), *sorted(folder.glob(f"{capability}*"))]


def late_bound_method(kernels: Callable[[], object], name: str) -> Callable[..., None]:
    """Returns a function that calls a method of `kernels()`, which is created on the first call."""
    return lambda *arguments: getattr(kernels(), name)(*arguments)


def dequantize_and_linear(kernels: Callable[[], object], token_limits: Iterable[int],
                          takes_pitch: bool = False) -> tuple[Kernel, ...]:
    """Returns "dequantize", and "linear" once for each token limit.

    Args:
        kernels: Returns the object whose methods of these names run. Its `linear` takes the limit
            of the variant as its first argument.
        token_limits: The most tokens of each variant of "linear", ascending.
        takes_pitch: Of "dequantize".
    """
    dtypes, linear = frozenset(C_TYPES), late_bound_method(kernels, "linear")
    table = [Kernel("dequantize", DEQUANTIZED, dtypes, late_bound_method(kernels, "dequantize"),
                    takes_pitch=takes_pitch)]
    min_tokens = 1
    for max_tokens in token_limits:
        table.append(Kernel("linear", MULTIPLIED, dtypes, functools.partial(linear, max_tokens),
                            min_tokens, max_tokens))
        min_tokens = max_tokens + 1
    return tuple(table)
