"""The text of a kernel in C++: what the platforms share in `source/`, for one weight format and its
dtypes.

A platform is a folder of `source/`: `lanes.h` says what neighbouring values are there, each kernel
has a file.
"""
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..format import Format
from .kernel import Kernel

SOURCES = Path(__file__).with_name("source")
TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
FORMAT_NAMES = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                          "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Codebook4Bit", "INT8"))


def kernel_source(platform: str, kernel: str, packed_format: type[Format] | None,
                  dtype: torch.dtype, value_dtype: torch.dtype | None = None, **definitions) -> str:
    """C++ without any include of ours.

    packed_format: None for a kernel that takes no weight. dtype, value_dtype: as in `Kernel`.
    definitions: further constants of the kernel.
    """
    definitions |= {"TYPE": TYPES[dtype], "VALUE_TYPE": TYPES[value_dtype or torch.float32]}
    if packed_format is not None:
        definitions |= {
            "FORMAT": next(base.__name__ for base in packed_format.__mro__
                           if base.__name__ in FORMAT_NAMES),
            "BLOCK_LENGTH": packed_format.block_length, "BLOCK_BYTES": packed_format.block_bytes,
            "SCALES_APART": int(packed_format.scales_apart)
        }
    codebook = getattr(packed_format, "codebook", None) or getattr(packed_format, "values", None)
    if codebook:
        definitions["CODEBOOK"] = c_floats(codebook)
    return "\n".join((*(f"#define {name} {value}" for name, value in definitions.items()),
                      *(path.read_text(encoding="utf-8")
                        for path in source_files(platform, packed_format, kernel))))


def c_floats(numbers: Iterable[float]) -> str:
    """Numbers as C++ has those of an array of floats, exactly."""
    return ", ".join(f"{value.hex()}f"
                     for value in torch.tensor(tuple(numbers), dtype=torch.float32).tolist())


def source_files(platform: str, packed_format: type[Format] | None, kernel: str) -> list[Path]:
    """What makes a kernel, in order. A family of formats has one file, named as the one in
    ops/formats; kernels whose names begin alike may have one too."""
    folder, weight = SOURCES / platform, []
    if packed_format is not None:
        weight = [
            SOURCES / "formats" / f"{packed_format.__module__.rpartition('.')[2]}.h",
            SOURCES / "weight.h"
        ]
    return [
        folder / "lanes.h", *weight, *folder.glob(f"{kernel.partition('_')[0]}.h"),
        *folder.glob(f"{kernel}.*")
    ]


def addresses(packed_format: type[Format], tensors: list[torch.Tensor],
              first: int = 0) -> tuple[int, int | None]:
    """Of block `first` and of its scale, if the blocks do not hold their scales."""
    scales = (
        tensors[1].data_ptr() + first * tensors[1].itemsize if packed_format.scales_apart else None
    )
    return tensors[0].data_ptr() + first * packed_format.block_bytes, scales


def method(kernels: Callable[[], object], name: str) -> Callable[..., None]:
    """Calls a method of what `kernels` gives, which is made when the first kernel runs."""
    return lambda *arguments: getattr(kernels(), name)(*arguments)


def dequantize_and_linear(kernels: Callable[[], object],
                          most_tokens: Iterable[int]) -> tuple[Kernel, ...]:
    """The two kernels that every such backend has as methods: "linear", which takes the most tokens
    of its variant first, once for each of `most_tokens`."""
    dtypes, least, linear = frozenset(TYPES), 1, method(kernels, "linear")
    table = [Kernel("dequantize", FORMAT_NAMES, dtypes, method(kernels, "dequantize"))]
    for most in most_tokens:
        table.append(
            Kernel("linear", FORMAT_NAMES, dtypes, functools.partial(linear, most), least, most))
        least = most + 1
    return tuple(table)
