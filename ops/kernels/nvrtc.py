"""CUDA C++ compiled by NVRTC and run through the CUDA driver, both by ctypes: neither a compiler
nor a toolkit is needed.

Torch's CUDA builds bring NVRTC along, and the driver's library comes with the GPU's driver.
Sources: NVIDIA's NVRTC documentation, CUDA Driver API reference (both 12.9).
"""
import ctypes
import importlib.util
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

import torch

ON_WINDOWS = sys.platform == "win32"
DRIVER = "nvcuda.dll" if ON_WINDOWS else "libcuda.so.1"
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class CudaError(RuntimeError):
    """NVRTC or the driver refused something. The message is theirs."""


def nvrtc_libraries() -> list[str]:
    """Paths of NVRTC in torch and in NVIDIA's wheels, the one of torch's own CUDA version first,
    and at last the name that the system may have it under. (To look for it by ctypes would start
    `ldconfig`, a compiler and `ld`.)"""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(torch.__file__).parent / "lib"]
    for root in map(Path, spec.submodule_search_locations or () if spec else ()):
        folders += [
            folder for place in ("*/lib", "*/bin", "*/bin/x86_64")
            for folder in sorted(root.glob(place))
        ]
    pattern = "nvrtc64_*_0.dll" if ON_WINDOWS else "libnvrtc*.so*"
    found = dict.fromkeys(str(path) for folder in folders for path in sorted(folder.glob(pattern))
                          if "builtins" not in path.name and ".alt" not in path.name)
    major = (torch.version.cuda or "").partition(".")[0]
    mark = f"nvrtc64_{major}" if ON_WINDOWS else f".so.{major}"
    ordered = sorted(found, key=lambda path: not major or mark not in Path(path).name)
    return ordered if ON_WINDOWS or not major else [*ordered, f"libnvrtc.so.{major}"]


class Compiler:
    """NVRTC. library: its path or name. `architectures`: compute capabilities it has code for, 75
    for 7.5."""

    def __init__(self, library: str):
        if ON_WINDOWS:  # NVRTC loads this one by its name alone
            for builtins in Path(library).parent.glob("nvrtc-builtins64_*[0-9].dll"):
                ctypes.CDLL(str(builtins))
        self._nvrtc = ctypes.CDLL(library)
        self._nvrtc.nvrtcGetErrorString.restype = c_char_p
        major, minor, count = c_int(), c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = major.value, minor.value
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        architectures = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", architectures)
        self.architectures = tuple(architectures)

    def _call(self, name: str, *arguments):
        status = getattr(self._nvrtc, name)(*arguments)
        if status:
            raise CudaError(f"{name}: {self._nvrtc.nvrtcGetErrorString(status).decode()}")

    def compile(self, source: str, capability: int) -> bytes:
        """Machine code for one compute capability, or PTX of the nearest older one where this NVRTC
        is older than the GPU.

        No product and sum are contracted into one rounding, nor are subnormal numbers flushed.
        """
        known = [architecture for architecture in self.architectures if architecture <= capability]
        if not known:
            raise CudaError(
                f"NVRTC {self.version[0]}.{self.version[1]} has no code for compute capability"
                f" {capability / 10}"
            )
        exact = capability in known
        options = [
            f"--gpu-architecture={'sm' if exact else 'compute'}_{max(known)}", "--fmad=false",
            "--std=c++17"
        ]
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), b"featherweight.cu", 0,
                   None, None)
        try:
            try:
                self._call("nvrtcCompileProgram", program, len(options),
                           (c_char_p * len(options))(*(option.encode() for option in options)))
            except CudaError as error:
                raise CudaError(
                    f"{error}: {self._output(program, 'ProgramLog').rstrip(bytes(1)).decode()}"
                ) from None
            return self._output(program, "CUBIN" if exact else "PTX")
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _output(self, program: c_void_p, kind: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, byref(size))
        output = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, output)
        return output.raw


class Driver:
    """The CUDA driver. library: its path or name. Devices are torch's indices: both number the
    visible ones alike."""

    def __init__(self, library: str = DRIVER):
        self._cuda = ctypes.CDLL(library)
        self._cuda.cuCtxPushCurrent_v2.argtypes = c_void_p,
        self._cuda.cuLaunchKernel.argtypes = (
            c_void_p,
            *[c_uint] * 7,
            c_void_p,
            POINTER(c_void_p),
            c_void_p,
        )
        self.call("cuInit", 0)
        self._contexts: dict[int, c_void_p] = {}

    def call(self, name: str, *arguments):
        status = getattr(self._cuda, name)(*arguments)
        if status:
            message = c_char_p()
            self._cuda.cuGetErrorString(status, byref(message))
            raise CudaError(
                f"{name}: {(message.value or b'error ' + str(status).encode()).decode()}")

    def capability(self, index: int) -> int:
        """75 for compute capability 7.5."""
        device, major, minor = c_int(), c_int(), c_int()
        self.call("cuDeviceGet", byref(device), index)
        self.call("cuDeviceGetAttribute", byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        self.call("cuDeviceGetAttribute", byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        return major.value * 10 + minor.value

    def in_context(self, index: int, name: str, *arguments):
        """`call` in the context that torch uses on a device, whatever this thread's device is."""
        if index not in self._contexts:
            device, context = c_int(), c_void_p()
            self.call("cuDeviceGet", byref(device), index)
            self.call("cuDevicePrimaryCtxRetain", byref(context), device)
            self._contexts[index] = context
        self.call("cuCtxPushCurrent_v2", self._contexts[index])
        try:
            self.call(name, *arguments)
        finally:
            self.call("cuCtxPopCurrent_v2", byref(c_void_p()))


class Module:
    """Kernels on one device. image: what `Compiler.compile` returns."""

    def __init__(self, driver: Driver, index: int, image: bytes):
        self._driver, self._index = driver, index
        self._module = c_void_p()
        self._functions: dict[str, c_void_p] = {}
        driver.in_context(index, "cuModuleLoadData", byref(self._module), image)

    def launch(self, name: str, blocks: int, threads: int, stream: int, *arguments):
        """Start a kernel. stream: a CUstream. arguments: ctypes values of the kernel's types."""
        if name not in self._functions:
            function = c_void_p()
            self._driver.in_context(self._index, "cuModuleGetFunction", byref(function),
                                    self._module, name.encode())
            self._functions[name] = function
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._driver.in_context(self._index, "cuLaunchKernel", self._functions[name], blocks, 1, 1,
                                threads, 1, 1, 0, stream, addresses, None)
