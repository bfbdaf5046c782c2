"""Formats and references for the tests of kernels."""
import contextlib
import sys
from pathlib import Path

import ggml_reference
import precompiled
import pytest
import torch

from featherweight.ops import kernels
from featherweight.ops.formats import integers
from featherweight.ops.formats.base import FORMATS, GGML_FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.formats.row_layout import RowFormat
from featherweight.ops.formats.sdnq import SDNQ_TYPES
from featherweight.ops.kernels import cpp_backend, selector
from featherweight.ops.layers import product  # noqa: F401

CODEBOOKS = [FORMATS["NF4"], FORMATS["FP4"]]
BASIC_FORMATS = [*GGML_FORMATS.values(), *CODEBOOKS, INT8.of_columns(96)]
ALL_FORMATS = BASIC_FORMATS + [
    fmt.of_block_length(length) for fmt in CODEBOOKS for length in (32, 4096)
]
ONE_OF_EACH_SOURCE = {
    getattr(fmt, "family", fmt.__module__): fmt for fmt in BASIC_FORMATS}.values()
CPU = torch.device("cpu")
BITS = {4: torch.int32, 2: torch.int16}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# family of formats by rows -> columns and, where they are not the family's own, its further sizes;
# 24 and 72 columns take eight lanes
ROW_SIZES = {
    "F8_E4M3": [(96,), (24,), (256, 64)], "F8_E5M2": [(96,), (24,), (256, 64)],
    "INT8_GROUPS": [(256,), (192, 24)], "MXFP8": [(96,)], "NVFP4_ROWS": [(96,), (80,)],
    "NVFP4_LOW": [(96,), (80,)],
    "INT8_CONVROT": [(512,), (192, 64), (48, 16), (1024, 1024)],
    "INT4_CONVROT": [(512,), (192, 64), (48, 16)],
    "W4A8": [(512,), (192, 64, 8), (512, 256, 32), (192, 64, 4)], "W4A8_INTEGERS": [(512,)],
    "W6A8": [(512,), (192, 64, 32)],
}
CPU_ROW_SIZES = ROW_SIZES | {
    "INT8_SMOOTHED": [(96,)], "F8_SMOOTHED": [(96,), (256, 64)], "NVFP4_SMOOTHED": [(96,)],
    "NVFP4_LOW_SMOOTHED": [(80,)], "SVDQUANT_NVFP4": [(96,)], "SVDQUANT_INT4": [(192,)],
    "SVDQUANT_INT4_HALF": [(192,)], "W4A16": [(192,), (256, 128)], "W4A16_HALF": [(192,)],
    "SDNQ_INT4": [(192, 64)],
    "SDNQ_UINT4": [(192, 64), (512, 0), (192, 64, 1, 8), (512, 32, 1, 16, 4), (512, 0, 1, 128)],
    "SDNQ_INT8": [(96, 0), (192, 64), (192, 64, 1, 64), (256, 64, 1, 256, 4), (512, 64, 1, 64, 4)],
    "SDNQ_UINT8": [(96, 0)],
    "W4A16_FLOAT": [(192,)], "AWQ_INT4": [(192,), (256, 128)], "AWQ_INT4_HALF": [(192,)],
    "NVFP4_QUOTIENT": [(96,), (80,)],
} | {
    f"{name}{bits}_GROUPED{ending}": [(96, 32), (48, 24)] if bits == 3 else [(96, 32)]
    for name in ("INT", "UINT") for bits in integers.BITS for ending in ("", "_HALF", "_FLOAT")
} | {f"QUANTO_INT{bits}{ending}": [(256, 64)]
     for bits in (2, 4) for ending in ("", "_HALF", "_FLOAT")} | {
    family.name: [(192, 64)] for family in SDNQ_TYPES.values()
    if family.name not in ("SDNQ_INT4", "SDNQ_INT8", "SDNQ_UINT4", "SDNQ_UINT8")}
each_row_format = pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in ROW_SIZES.items() for size in sizes],
    ids=str)
each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wait_for_kernels(monkeypatch):
    """Makes the first call wait for every kernel, and uses products of the load that is now."""
    monkeypatch.setattr(selector, "submit", lambda work: work())
    monkeypatch.setattr(selector, "_next_load", lambda: 0)


def shared_cache(tmp_path_factory) -> Path:
    """Returns a cache folder for all tests of a process that do not test the cache."""
    folder = tmp_path_factory.getbasetemp() / "user_cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def cpu_kernels(cache_folder):
    """Uses kernels of this CPU, compiled into a cache folder; every call waits for them."""
    if sys.platform == "win32" or cpp_backend.cpp_compiler() is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(cache_folder))
        patch.setattr(kernels, "_selectors", {})
        wait_for_kernels(patch)
        patch.setattr(cpp_backend, "FLAGS", precompiled.cpu_flags())
        cpp_backend._kernels.cache_clear()
        yield patch
    cpp_backend._kernels.cache_clear()


def assert_same_bits(values, expected):
    """Asserts equal bit patterns; any NaN equals any NaN. values: on any device."""
    values = values.cpu()
    assert values.dtype == expected.dtype and values.shape == expected.shape
    bits = BITS[values.dtype.itemsize]
    wrong = (values.view(bits) != expected.view(bits)) & ~(values.isnan() & expected.isnan())
    assert not wrong.any(), (f"{wrong.sum()} of {wrong.numel()} values differ, the first at "
                             f"{wrong.nonzero()[0].tolist()}")


def reference(fmt, tensors) -> torch.Tensor:
    """Returns float32 values by gguf, or by bitsandbytes' definition."""
    if fmt.ggml_type is not None:
        return ggml_reference.reference(fmt, tensors[0].numpy()).flatten()
    if isinstance(fmt, RowFormat) and fmt.layout.is_int8:
        values = tensors[0].view(torch.int8).float()
    else:
        codes = torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten().long()
        values = torch.tensor(fmt.codebook)[codes]
    return values * tensors[1].repeat_interleave(fmt.block_length)
