"""Runs every backend on this CPU, compiled and launched by the same Python as on its platform, and
that of a GPU on the GPU too where there is one."""
import contextlib
import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import precompiled
import pytest
import torch
from pack_api import cpp_backend

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.kernels import cuda_backend, metal_backend
from featherweight.ops.kernels.cpp_backend import CppCompiler, CpuKernels
from featherweight.ops.kernels.kernel import Backend
from featherweight.ops.kernels.runtime_compiler import CUDA, HIP, Api, Driver, GpuError
from featherweight.ops.kernels.validation import probe

KERNEL_TESTS = Path(__file__).resolve().parents[1] / "ops" / "kernels"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
# The sanitizers end the process at a load from an address that a GPU refuses.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing",
         "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-w", "-fPIC",
         "-shared"]
# Variants of the CPU's backend: instructions that are turned off, and possible numbers of lanes.
CPUS = {"cpp": ((), (16, 8)), "cpp with AVX2": (("-mno-avx512f",), (8,)),
        "cpp without AVX": (("-mno-avx",), (8,))}
# Variants of the backend of GPUs: the names it calls, the architecture, the threads of a warp.
GPUS = {"nvrtc": (CUDA, "sm_86", 32), "hiprtc": (HIP, "gfx1100", 32),
        "hiprtc with warps of 64": (HIP, "gfx90a:sramecc+:xnack-", 64)}
BACKENDS = (*CPUS, *GPUS, "metal", "gpu")
CPU = torch.device("cpu")


def device_of(backend: Backend) -> torch.device:
    """Returns where a backend of `backend_on_cpu` runs."""
    return torch.device("cuda", 0) if backend is cuda_backend.BACKEND else CPU


def compiled(folder: Path, text: str, include: str, *libraries: str) -> str:
    """Compiles a text. Returns the library's path. Raises RuntimeError with the error's text."""
    name = hashlib.sha256(f"{include} {libraries} {text}".encode()).hexdigest()[:32]
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    if library.is_file():
        return str(library)
    source.write_text(text, encoding="utf-8")
    command = [COMPILER, *FLAGS, f"-I{KERNEL_TESTS / include}", str(source), "-o", str(library),
               *libraries]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return str(library)


def change_source(monkeypatch, old: str, new: str):
    """Plants a fault in the sources of all backends."""
    for module in (cpp_backend, cuda_backend, metal_backend):
        def changed(*arguments, real=module.kernel_source, **more):
            source = real(*arguments, **more)
            assert old in source
            return source.replace(old, new)

        monkeypatch.setattr(module, "kernel_source", changed)


class CudaCompiler:
    """Replaces NVRTC and hiprtc: compiles for the CPU. An image is the path of a library."""

    version = options = ()

    def __init__(self, folder: Path, api: Api, architecture: str, warp: int):
        self.folder, self.architecture, self.warp = folder, architecture, warp
        header = (KERNEL_TESTS / "cuda_on_cpu" / "kernel.h").read_text(encoding="utf-8")
        self.header = precompiled.precompile(header, tuple(FLAGS))
        self.vendor = "#define __HIP__\n" if api is HIP else ""

    def compile(self, source: str, architecture: str) -> bytes:
        assert architecture == self.architecture
        kernel = re.search(r"__global__ void (\w+)\(", source)[1]
        text = f'#include "{self.header}"\n{self.vendor}{source}\nEXPORT({kernel}, {self.warp})'
        return self.library(text).encode()

    def library(self, text: str) -> str:
        try:
            return compiled(self.folder, text, "cuda_on_cpu", "-ldl")
        except RuntimeError as error:
            raise GpuError(str(error)) from None


class MetalFunction:
    """Replaces torch's compiled Metal kernel. Accepts only what torch and Metal's validation do."""

    def __init__(self, library: ctypes.CDLL):
        sizes = (ctypes.c_int * 32)()
        self._element_bytes = sizes[:library.element_bytes(sizes)]
        self._launch = library.launch
        self._launch.restype = ctypes.c_bool

    def __call__(self, *arguments, threads=None, group_size=None):
        assert len(arguments) == len(self._element_bytes)
        pointers = (ctypes.c_void_p * len(arguments))()
        numbers = []  # as torch passes them, in 64 bits
        for index, (argument, element_bytes) in enumerate(zip(arguments, self._element_bytes)):
            if element_bytes:
                assert isinstance(argument, torch.Tensor) and argument.numel()
                assert argument.storage_offset() * argument.itemsize % element_bytes == 0
                pointers[index] = argument.data_ptr()
            else:
                assert type(argument) is int
                numbers.append(ctypes.c_longlong(argument))
                pointers[index] = ctypes.addressof(numbers[-1])
        threads, group = ([*([size] if isinstance(size, int) else size), 1][:2]
                          for size in (threads, group_size))
        assert all(0 < count < 1 << 32 for count in threads) and 0 < math.prod(group) <= 1024
        if any(count % size for count, size in zip(threads, group)):
            group = [1, 1]  # the last group is a smaller one
        groups = [count // size for count, size in zip(threads, group)]
        assert self._launch(pointers, (ctypes.c_uint * 2)(*groups), (ctypes.c_uint * 2)(*group)), (
            "some threads of a group do not reach a barrier")


def compile_shader(folder: Path, source: str) -> ctypes.CDLL:
    """Replaces `torch.mps.compile_shader`: returns an object with the kernel as an attribute."""
    kernel = re.search(r"^kernel void (\w+)\(", source, re.M)[1]
    try:
        path = compiled(folder, f"{source}\nEXPORT({kernel})\n", "metal_on_cpu")
    except RuntimeError as error:
        raise SyntaxError(str(error)) from None
    library = ctypes.CDLL(path)
    setattr(library, kernel, MetalFunction(library))
    return library


@contextlib.contextmanager
def backend_on_cpu(name: str, cache: Path) -> Iterator[Backend]:
    """Yields one of `BACKENDS`. It keeps what it compiles in `cache`, as in a user's cache."""
    if name == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield cuda_backend.BACKEND
        return
    if COMPILER is None or sys.platform == "win32":
        pytest.skip("needs a C++ compiler")
    if name in CPUS:
        options, lanes = CPUS[name]
        if options and platform.machine().lower() not in ("x86_64", "amd64"):
            pytest.skip("instructions of x86")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpp_backend, "FLAGS", precompiled.cpu_flags(*options))
            patch.setattr(torch.cpu, "_is_avx512_supported", partial(lambda: 16 in lanes))
            kernels = CpuKernels(CppCompiler((COMPILER,), cache / "featherweight" / "kernels"))
            has_bfloat16 = not options and cpu_features.has_avx512_bfloat16()
            yield Backend("cpp", partial(probe, kernels.dequantize),
                          cpp_backend.kernel_table(lambda: kernels, has_bfloat16))
        return
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    folder = cache / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if name == "metal":
            patch.setattr(torch.mps, "compile_shader", partial(compile_shader, folder))
            for cache in (metal_backend._shader, metal_backend._compiled):
                cache.cache_clear()
            yield metal_backend.BACKEND
            for cache in (metal_backend._shader, metal_backend._compiled):
                cache.cache_clear()
        else:
            api, architecture, warp = GPUS[name]
            compiler = CudaCompiler(folder, api, architecture, warp)
            driver = (KERNEL_TESTS / "cuda_on_cpu" / "driver.cpp").read_text(encoding="utf-8")
            kernels = cuda_backend.CudaKernels(
                compiler, Driver(compiler.library(driver), api), folder / "images")
            patch.setattr(cuda_backend, "current_stream", lambda index: 0)
            properties = types.SimpleNamespace(gcnArchName=architecture, warp_size=warp)
            patch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
            yield Backend(api.compiler, partial(probe, kernels.dequantize),
                          cuda_backend.kernel_table(lambda: kernels))
