"""The CUDA sources compile for every GPU without one, and give the reference's values: run on the CPU, by the same Python."""
import ctypes
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import gguf
import pytest
import torch
from featherweight.ops import formats  # noqa: F401
from featherweight.ops import kernels as kernel_layer
from featherweight.ops.format import FORMATS, GGML_FORMATS
from featherweight.ops.kernels import nvrtc, nvrtc_backend
from featherweight.ops.kernels.check import check, random_tensors
from featherweight.ops.kernels.nvrtc import Compiler, CudaError, Driver
from featherweight.ops.kernels.nvrtc_backend import FORMAT_NAMES, Program
from gguf import GGMLQuantizationType

ON_CPU = Path(__file__).with_name("cuda_on_cpu")
CPP = os.environ.get("CXX") or shutil.which("g++")
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
CODEBOOK_FORMATS = [FORMATS[name].of_block_length(length) for name in ("NF4", "FP4") for length in (32, 64, 4096)]
ALL_FORMATS = [fmt for fmt in GGML_FORMATS.values() if fmt.__name__ in FORMAT_NAMES] + CODEBOOK_FORMATS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {4: torch.int32, 2: torch.int16}
each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_capability = pytest.mark.parametrize("capability", CAPABILITIES)


@pytest.fixture(scope="module")
def compiler():
    libraries = nvrtc.nvrtc_libraries()
    if not libraries:
        pytest.skip("no NVRTC here: pip install nvidia-cuda-nvrtc-cu12")
    return Compiler(libraries[0])


class CpuCompiler:
    """Compiles CUDA C++ for the CPU; an image is the path of a library."""

    def __init__(self, folder: Path):
        self.folder = folder

    def library(self, name: str, text: str) -> str:
        source, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        source.write_text(text, encoding="utf-8")
        built = subprocess.run([CPP, "-std=c++17", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w",
                                f"-I{ON_CPU}", str(source), "-o", str(library), "-ldl"], capture_output=True, text=True)
        if built.returncode:
            raise CudaError(built.stderr)
        return str(library)

    def compile(self, source: str, capability: int) -> bytes:
        assert capability == 86
        kernel = "unpack" if " unpack(" in source else "linear"
        name = f"kernel{len(list(self.folder.iterdir()))}"
        return self.library(name, f'#include "kernel.h"\n{source}\nEXPORT({kernel})').encode()


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The kernels as the backend compiles, loads and starts them, where the device is this CPU."""
    if CPP is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    compiler = CpuCompiler(tmp_path_factory.mktemp("cuda"))
    try:
        driver = Driver(compiler.library("libcuda", (ON_CPU / "driver.cpp").read_text(encoding="utf-8")))
        compiler.library("empty", '#include "kernel.h"')
    except CudaError as error:
        pytest.skip(f"{CPP} cannot compile the CPU's part: {str(error)[:500]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
        yield nvrtc_backend.CudaKernels(compiler, driver)


def assert_same_bits(values, expected):
    bits = BITS[values.dtype.itemsize]
    wrong = (values.view(bits) != expected.view(bits)) & ~(values.isnan() & expected.isnan())
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} values differ, the first at {wrong.nonzero()[0].tolist()}"


def reference(fmt, tensors) -> torch.Tensor:
    """float32 values by gguf, or by bitsandbytes' definition."""
    if fmt.ggml_type is not None:
        return torch.from_numpy(gguf.quants.dequantize(tensors[0].numpy(), GGMLQuantizationType(fmt.ggml_type))).flatten()
    codes = torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten().long()
    return torch.tensor(fmt.codebook)[codes] * tensors[1].repeat_interleave(fmt.block_length)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_dtype
@each_format
def test_unpack_equals_the_reference_rounded_once(on_cpu, fmt, dtype):
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 600, torch.device("cpu"))
    expected = reference(fmt, tensors)
    out = torch.empty(len(expected), dtype=dtype)
    on_cpu.unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, expected.to(dtype))
