"""llama.cpp's own quantiser, compiled from its pinned source: what the recipes of the field pack
with.

It needs a C compiler and the source that `python3 dev.py setup` fetches.
"""
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from devtools.files import gguf_types  # noqa: F401  gguf takes the types that are newer than it
from devtools.host.environment import LLAMA_CPP

SOURCE = LLAMA_CPP / "ggml" / "src" / "ggml-quants.c"
# What the file wants of ggml's others.
BESIDE = """
#include <stdlib.h>
#include "ggml.h"
#define GGML_COMMON_DECL_C
#include "ggml-common.h"
void ggml_abort(const char *file, int line, const char *text, ...) { abort(); }
const char *ggml_type_name(enum ggml_type type) { return "?"; }
size_t ggml_type_size(enum ggml_type type) { return 0; }
size_t ggml_row_size(enum ggml_type type, int64_t count) {
    switch (type) {
        SIZES
        default: abort();
    }
}
"""
SIZES = "".join(
    f"case GGML_TYPE_{name}: return count / {length} * {size};\n        "
    for name, (length, size) in ((kind.name, gguf.constants.GGML_QUANT_SIZES[kind])
                                 for kind in (GGMLQuantizationType[name]
                                              for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
                                                           "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                                                           "IQ4_NL", "IQ4_XS"))))


def available() -> bool:
    return SOURCE.is_file() and _compiler() is not None


def _compiler() -> str | None:
    return (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        beside, built = Path(folder) / "beside.c", Path(folder) / "quantiser.so"
        beside.write_text(BESIDE.replace("SIZES", SIZES))
        includes = [f"-I{SOURCE.parent}", f"-I{SOURCE.parent.parent / 'include'}"]
        options = ["-O2", "-w", "-shared", "-fPIC", "-D_GNU_SOURCE"]
        subprocess.run(
            [_compiler() or "cc", *options, *includes,
             str(SOURCE),
             str(beside), "-lm", "-o",
             str(built)], check=True)
        return ctypes.CDLL(str(built))


def pack(values: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Packed rows, uint8 (N, bytes), of float32 `values` (N, K). importance: float32 (K,), as of an
    importance matrix."""
    kind = GGMLQuantizationType[type_name]
    values = np.ascontiguousarray(values, np.float32)
    packed = np.zeros(gguf.quants.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    importance = None if importance is None else np.ascontiguousarray(importance, np.float32)
    function = getattr(library(), f"quantize_{type_name.lower().replace('_k', '_K')}")
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]
    weights = None if importance is None else importance.ctypes.data
    written = function(values.ctypes.data, packed.ctypes.data, *values.shape, weights)
    if written != packed.nbytes:
        raise RuntimeError(
            f"llama.cpp's quantiser wrote {written} bytes of {type_name}, not {packed.nbytes}.")
    return packed


def dequantize(packed: np.ndarray, type_name: str) -> np.ndarray:
    """The values, float32 (N, K), of packed rows, uint8 (N, bytes)."""
    kind = GGMLQuantizationType[type_name]
    packed = np.ascontiguousarray(packed, np.uint8)
    values = np.empty(gguf.quants.quant_shape_from_byte_shape(packed.shape, kind), np.float32)
    function = getattr(library(), f"dequantize_row_{type_name.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(packed.ctypes.data, values.ctypes.data, values.size)
    return values
