"""Compiles CUDA C++ with NVRTC and runs it through the CUDA driver, both by ctypes.

Neither a C++ compiler nor the CUDA toolkit is needed: torch's CUDA builds contain NVRTC, and the
GPU's driver contains the driver library.
Sources: NVIDIA's NVRTC documentation, CUDA Driver API reference (both 12.9).
"""
import ctypes
import importlib.util
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

import torch

from ..pickle_names import short_error_name

ON_WINDOWS = sys.platform == "win32"
DRIVER = "nvcuda.dll" if ON_WINDOWS else "libcuda.so.1"
# CUdevice_attribute
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76


@short_error_name
class CudaError(RuntimeError):
    """An error of NVRTC or of the driver, with their message."""


def nvrtc_libraries() -> list[str]:
    """Returns where NVRTC may be: paths in torch and in NVIDIA's wheels, last the system's name.

    The path for torch's own CUDA version comes first. ctypes' search for libraries is not used: it
    starts `ldconfig`, a compiler and `ld`.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(torch.__file__).parent / "lib"]
    if spec is not None:
        for root in map(Path, spec.submodule_search_locations or ()):
            for pattern in ("*/lib", "*/bin", "*/bin/x86_64"):
                folders += sorted(root.glob(pattern))
    pattern = "nvrtc64_*_0.dll" if ON_WINDOWS else "libnvrtc*.so*"
    paths = dict.fromkeys(str(path) for folder in folders for path in sorted(folder.glob(pattern))
                          if "builtins" not in path.name and ".alt" not in path.name)
    major = (torch.version.cuda or "").partition(".")[0]
    version_mark = f"nvrtc64_{major}" if ON_WINDOWS else f".so.{major}"
    ordered = sorted(paths, key=lambda path: not major or version_mark not in Path(path).name)
    return ordered if ON_WINDOWS or not major else [*ordered, f"libnvrtc.so.{major}"]


class Compiler:
    """NVRTC.

    Args:
        library: Its path or name.

    Attributes:
        version: Major and minor.
        architectures: The compute capabilities that it can compile for, 75 for 7.5.
    """

    def __init__(self, library: str):
        if ON_WINDOWS:  # NVRTC loads these by their name alone
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
        """Compiles a source for one compute capability.

        Products and sums are not contracted into one rounding, and subnormals are not flushed.

        Args:
            source: CUDA C++.
            capability: 75 for compute capability 7.5.

        Returns:
            Machine code, or PTX for the newest capability that NVRTC knows where the GPU is newer.

        Raises:
            CudaError: With NVRTC's message.
        """
        usable = [architecture for architecture in self.architectures if architecture <= capability]
        if not usable:
            raise CudaError(
                f"NVRTC {self.version[0]}.{self.version[1]} has no code for compute capability"
                f" {capability / 10}"
            )
        is_known = capability in usable
        options = [f"--gpu-architecture={'sm' if is_known else 'compute'}_{max(usable)}",
                   "--fmad=false", "--std=c++17"]
        program = c_void_p()
        self._call("nvrtcCreateProgram", byref(program), source.encode(), b"featherweight.cu", 0,
                   None, None)
        try:
            try:
                self._call("nvrtcCompileProgram", program, len(options),
                           (c_char_p * len(options))(*(option.encode() for option in options)))
            except CudaError as error:
                compiler_log = self._output(program, "ProgramLog").rstrip(b"\0").decode()
                raise CudaError(f"{error}: {compiler_log}") from None
            return self._output(program, "CUBIN" if is_known else "PTX")
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _output(self, program: c_void_p, name: str) -> bytes:
        """Returns "ProgramLog", "CUBIN" or "PTX" of a program."""
        size = c_size_t()
        self._call(f"nvrtcGet{name}Size", program, byref(size))
        output = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{name}", program, output)
        return output.raw


class CudaDriver:
    """The CUDA driver. Its device indices are torch's: both number the visible devices alike.

    Args:
        library: Its path or name.
    """

    def __init__(self, library: str = DRIVER):
        self._cuda = ctypes.CDLL(library)
        self._cuda.cuCtxPushCurrent_v2.argtypes = (c_void_p,)
        self._cuda.cuLaunchKernel.argtypes = (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p),
                                              c_void_p)
        self.call("cuInit", 0)
        self._contexts: dict[int, c_void_p] = {}

    def call(self, name: str, *arguments):
        """Calls a function of the driver. Raises CudaError."""
        status = getattr(self._cuda, name)(*arguments)
        if status:
            message = c_char_p()
            self._cuda.cuGetErrorString(status, byref(message))
            text = message.value.decode() if message.value else f"error {status}"
            raise CudaError(f"{name}: {text}")

    def capability(self, index: int) -> int:
        """Returns a device's compute capability, 75 for 7.5."""
        device, major, minor = c_int(), c_int(), c_int()
        self.call("cuDeviceGet", byref(device), index)
        self.call("cuDeviceGetAttribute", byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        self.call("cuDeviceGetAttribute", byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        return major.value * 10 + minor.value

    def in_context(self, index: int, name: str, *arguments):
        """Runs `call` in the context that torch uses on a device, whatever the current device."""
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
    """Compiled kernels, loaded on one device.

    Args:
        driver: That loads them.
        index: Of the device.
        image: What `Compiler.compile` returned.
    """

    def __init__(self, driver: CudaDriver, index: int, image: bytes):
        self._driver, self._index = driver, index
        self._module = c_void_p()
        self._functions: dict[str, c_void_p] = {}
        driver.in_context(index, "cuModuleLoadData", byref(self._module), image)

    def launch(self, name: str, blocks: tuple[int, ...], threads: tuple[int, ...], stream: int,
               *arguments):
        """Starts a kernel.

        Args:
            name: Of the kernel in the source.
            blocks: In the grid, in up to three dimensions.
            threads: Per block, in up to three dimensions.
            stream: A CUstream.
            arguments: ctypes values of the kernel's parameter types.
        """
        if name not in self._functions:
            function = c_void_p()
            self._driver.in_context(self._index, "cuModuleGetFunction", byref(function),
                                    self._module, name.encode())
            self._functions[name] = function
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        dimensions = [*(*blocks, 1, 1)[:3], *(*threads, 1, 1)[:3]]
        self._driver.in_context(self._index, "cuLaunchKernel", self._functions[name], *dimensions,
                                0, stream, addresses, None)
