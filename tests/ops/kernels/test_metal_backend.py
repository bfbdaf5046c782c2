"""What only Metal has: flushed subnormals, and pointers with address spaces. The rest is in
test_backends.py."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_backends import backend_on_cpu
from kernel_cases import (
    ALL_FORMATS,
    ONE_OF_EACH_SOURCE,
    assert_same_bits,
    each_dtype,
    each_format,
    reference,
    shared_cache,
)
from pack_api import FORMATS, check, random_tensors

from featherweight.ops.formats.row_layout import RowFormat
from featherweight.ops.kernels import metal_backend
from featherweight.ops.kernels.kernel_source import C_TYPES, kernel_source
from featherweight.ops.kernels.metal_backend import BACKEND, dequantize

ON_CPU = Path(__file__).with_name("metal_on_cpu")
CLANG = os.environ.get("CLANG") or shutil.which("clang") or shutil.which("clang-19")
CPU = torch.device("cpu")
COMPILE_SHADER = torch.mps.compile_shader


@pytest.fixture(scope="module", autouse=True)
def on_cpu(tmp_path_factory):
    with backend_on_cpu("metal", shared_cache(tmp_path_factory)):
        yield


def test_dequantize_of_blocks_that_do_not_divide_into_chunks():
    fmt = FORMATS["NF4"].of_block_length(12)
    tensors = random_tensors(fmt, 8, CPU)
    out = torch.empty(96)
    dequantize(fmt, tensors, out, 0)
    assert_same_bits(out, reference(fmt, tensors))


@pytest.fixture
def flushed():
    """flushed(): makes torch and the kernels flush float32 subnormals to zero, as an Apple GPU
    does."""
    def flush():
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush subnormals to zero")

    yield flush
    torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_check_has_no_subnormals_that_one_gpu_flushes_and_another_does_not(flushed):
    for fmt in ALL_FORMATS:
        values = reference(fmt, random_tensors(fmt, 6000, CPU)).abs()
        assert not ((values > 0) & (values < 16 * torch.finfo(torch.float32).tiny)).any(), fmt
    flushed()
    for fmt in ONE_OF_EACH_SOURCE:
        check(BACKEND.kernels[0], fmt, torch.float32, CPU)


@each_dtype
def test_where_the_reference_has_zero_for_subnormals_the_kernel_has_too(flushed, dtype):
    fmt = FORMATS["MXFP4"]
    blocks = random_tensors(fmt, 256, CPU)[0]
    blocks[:, 0] = torch.arange(256)  # every scale
    flushed()
    expected = fmt.dequantize_into([blocks], torch.empty(256 * fmt.block_length, dtype=dtype))
    assert not expected[:2 * fmt.block_length].any() and expected[2 * fmt.block_length:].any()
    out = torch.empty_like(expected)
    dequantize(fmt, [blocks], out, 0)
    assert_same_bits(out, expected)


@pytest.mark.skipif(CLANG is None, reason="needs clang, or its name in CLANG")
@each_format
def test_every_pointer_has_the_right_address_space(fmt):
    """Of the usual compilers only Clang has address spaces, as Metal's compiler does."""
    kernel = "dequantize_rows" if isinstance(fmt, RowFormat) else "dequantize"
    for dtype in C_TYPES:
        source = kernel_source("metal", kernel, fmt, dtype, LANES=metal_backend.CHUNK)
        process = subprocess.run(
            [CLANG, "-x", "c++", "-std=c++14", "-w", "-fsyntax-only", f"-I{ON_CPU}", "-"],
            input=source, capture_output=True, text=True)
        assert not process.returncode, process.stderr


def test_without_metal_the_backend_says_so(monkeypatch):
    if torch.backends.mps.is_available():
        pytest.skip("there is Metal")
    monkeypatch.setattr(torch.mps, "compile_shader", COMPILE_SHADER)
    for cache in (metal_backend._shader, metal_backend._compiled):
        cache.cache_clear()
    with pytest.raises(RuntimeError, match="MPS is not available"):
        BACKEND.probe(CPU)
