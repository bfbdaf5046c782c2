"""Compiles C++ for GPUs with NVRTC or hiprtc and runs it through the driver, both by ctypes.

Neither a C++ compiler nor a toolkit is needed: torch's builds for CUDA and ROCm contain the
compiler, and the GPU's driver, or for ROCm torch too, contains the driver library.
Sources: NVIDIA's NVRTC documentation, CUDA Driver API reference (both 12.9); AMD's HIP RTC
documentation, HIP runtime API reference (both 6.4).
"""
import ctypes
import importlib.util
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..stable_names import short_error_name
from .kernel import compiler_error

SOURCE_FILE = "featherweight.cu"  # as a compiler's messages name the source
ON_WINDOWS = sys.platform == "win32"
# CUdevice_attribute
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76


@short_error_name
class GpuError(RuntimeError):
    """An error of the compiler or of the driver, with their message."""


@dataclass(frozen=True)
class Api:
    """The names that a vendor gives the same functions, and its files.

    Attributes:
        compiler: Prefix of the compiler's functions.
        driver: Prefix of the driver's functions.
        launch: Function that starts a kernel, without the prefix.
        architecture: Option that names the GPU.
        options: The other options. Products and sums are not contracted into one rounding, and
            subnormals are not flushed.
        code: What the compiler returns, in the name of its function.
        packages: Python packages that may hold the files.
        compiler_files: Patterns of the compiler's files on Linux and on Windows.
        needed_files: Pattern of the files that the compiler loads by their names on Windows.
        driver_files: Patterns of the driver's files on Linux and on Windows.
    """
    compiler: str
    driver: str
    launch: str
    architecture: str
    options: tuple[str, ...]
    code: str
    packages: tuple[str, ...]
    compiler_files: tuple[str, str]
    needed_files: str
    driver_files: tuple[str, str]


CUDA = Api("nvrtc", "cu", "LaunchKernel", "--gpu-architecture", ("--fmad=false", "--std=c++17"),
           "CUBIN", ("nvidia",), ("libnvrtc*.so*", "nvrtc64_*_0.dll"),
           "nvrtc-builtins64_*[0-9].dll", ("", ""))
HIP = Api("hiprtc", "hip", "ModuleLaunchKernel", "--offload-arch",
          ("-ffp-contract=off", "-std=c++17"), "Code", ("_rocm_sdk_core",),
          ("libhiprtc.so*", "hiprtc[0-9]*.dll"), "hiprtc-builtins*.dll",
          ("libamdhip64.so*", "amdhip64*.dll"))


def compiler_libraries(api: Api) -> list[str]:
    """Returns where the compiler may be: paths in torch and in the vendor's wheels, last the
    system's name.

    The path for torch's own version comes first. ctypes' search for libraries is not used: it
    starts `ldconfig`, a compiler and `ld`.
    """
    paths = _paths(api, api.compiler_files)
    major = _major(api)
    version_mark = f"nvrtc64_{major}" if ON_WINDOWS else f".so.{major}"
    ordered = sorted(paths, key=lambda path: not major or version_mark not in Path(path).name)
    return ordered if ON_WINDOWS or not major else [*ordered, f"lib{api.compiler}.so.{major}"]


def driver_libraries(api: Api) -> list[str]:
    """Returns where the driver library may be, as `compiler_libraries` does."""
    if api is CUDA:
        return ["nvcuda.dll" if ON_WINDOWS else "libcuda.so.1"]
    major = _major(api)
    system = f"amdhip64_{major}.dll" if ON_WINDOWS else f"libamdhip64.so.{major}"
    return [*_paths(api, api.driver_files), *([system] if major else [])]


def _major(api: Api) -> str:
    version = torch.version.cuda if api is CUDA else torch.version.hip
    return (version or "").partition(".")[0]


def _paths(api: Api, patterns: tuple[str, str]) -> list[str]:
    """Returns the files of one of two patterns in torch and in the vendor's packages."""
    folders = [Path(torch.__file__).parent / "lib"]
    for package in api.packages:
        spec = importlib.util.find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for pattern in ("lib", "bin", "*/lib", "*/bin", "*/bin/x86_64"):
                folders += sorted(root.glob(pattern))
    paths = dict.fromkeys(
        str(path) for folder in folders for path in sorted(folder.glob(patterns[ON_WINDOWS]))
        if "builtins" not in path.name and ".alt" not in path.name)
    return list(paths)


class Architecture(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        name: As the compiler's option names it, such as "sm_75" or "gfx90a:sramecc+:xnack-".
        warp: Threads that run together.
    """
    name: str
    warp: int = 32


class Compiler:
    """NVRTC or hiprtc.

    Args:
        library: Its path or name.
        api: Of its vendor.

    Attributes:
        version: Major and minor.
        capabilities: The compute capabilities that NVRTC can compile for, 75 for 7.5; for hiprtc
            empty.
    """

    def __init__(self, library: str, api: Api = CUDA):
        self._api, self.options = api, api.options
        if ON_WINDOWS:  # the compiler loads these by their name alone
            for needed in Path(library).parent.glob(api.needed_files):
                ctypes.CDLL(str(needed))
        self._library = ctypes.CDLL(library)
        self._function("GetErrorString").restype = c_char_p
        major, minor, count = c_int(), c_int(), c_int()
        self._call("Version", byref(major), byref(minor))
        self.version = major.value, minor.value
        self.capabilities: tuple[int, ...] = ()
        if api is CUDA:
            self._call("GetNumSupportedArchs", byref(count))
            capabilities = (c_int * count.value)()
            self._call("GetSupportedArchs", capabilities)
            self.capabilities = tuple(capabilities)

    def _function(self, name: str):
        return getattr(self._library, f"{self._api.compiler}{name}")

    def _call(self, name: str, *arguments):
        if status := self._function(name)(*arguments):
            message = self._function("GetErrorString")(status).decode()
            raise GpuError(f"{self._api.compiler}{name}: {message}")

    def compile(self, source: str, architecture: str) -> bytes:
        """Compiles a source for one architecture.

        Args:
            source: CUDA C++ or HIP.
            architecture: The name of an `Architecture`.

        Returns:
            Machine code, or PTX for the newest compute capability that NVRTC knows where the GPU is
            newer.

        Raises:
            SourceError: The source has a fault.
            CompilerError: It failed otherwise.
            GpuError: It knows no such GPU.
        """
        output = self._api.code
        if self._api is CUDA:
            architecture, output = self._known(architecture)
        options = [f"{self._api.architecture}={architecture}", *self._api.options]
        program = c_void_p()
        self._call("CreateProgram", byref(program), source.encode(), SOURCE_FILE.encode(), 0, None,
                   None)
        try:
            try:
                self._call("CompileProgram", program, len(options),
                           (c_char_p * len(options))(*(option.encode() for option in options)))
            except GpuError as error:
                compiler_log = self._output(program, "ProgramLog").rstrip(b"\0").decode()
                raise compiler_error(SOURCE_FILE, compiler_log)(
                    f"{error}: {compiler_log}") from None
            return self._output(program, output)
        finally:
            self._call("DestroyProgram", byref(program))

    def _known(self, architecture: str) -> tuple[str, str]:
        """Returns the newest architecture that NVRTC knows up to this one, and what it returns."""
        capability = int(architecture.removeprefix("sm_"))
        usable = [known for known in self.capabilities if known <= capability]
        if not usable:
            raise GpuError(f"NVRTC {self.version[0]}.{self.version[1]} has no code for compute"
                           f" capability {capability / 10}")
        if capability in usable:
            return architecture, self._api.code
        return f"compute_{max(usable)}", "PTX"

    def _output(self, program: c_void_p, name: str) -> bytes:
        """Returns "ProgramLog" or what was compiled of a program."""
        size = c_size_t()
        self._call(f"Get{name}Size", program, byref(size))
        output = ctypes.create_string_buffer(size.value)
        self._call(f"Get{name}", program, output)
        return output.raw


class Driver:
    """The CUDA driver or the HIP runtime. Device indices are torch's: all number the visible
    devices alike.

    Args:
        library: Its path or name.
        api: Of its vendor.
    """

    def __init__(self, library: str, api: Api = CUDA):
        self.api = api
        self._library = ctypes.CDLL(library)
        self._functions: dict[str, Any] = {}
        self._function(api.launch).argtypes = (c_void_p, *[c_uint] * 7, c_void_p,
                                               POINTER(c_void_p), c_void_p)
        if api is CUDA:
            self._function("CtxPushCurrent_v2").argtypes = (c_void_p,)
        else:
            self._function("GetErrorString").restype = c_char_p
        self.call("Init", 0)
        self._contexts: dict[int, c_void_p] = {}
        self._architectures: dict[int, Architecture] = {}

    def _function(self, name: str):
        return getattr(self._library, f"{self.api.driver}{name}")

    def call(self, name: str, *arguments):
        """Calls a function, its name without the prefix. Raises GpuError."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._function(name)
        if status := function(*arguments):
            raise GpuError(f"{self.api.driver}{name}: {self._message(status)}")

    def _message(self, status: int) -> str:
        message = c_char_p()
        if self.api is CUDA:
            self._function("GetErrorString")(status, byref(message))
        else:
            message.value = self._function("GetErrorString")(status)
        return message.value.decode() if message.value else f"error {status}"

    def architecture(self, index: int) -> Architecture:
        """Returns the architecture of a device."""
        if index not in self._architectures:
            self._architectures[index] = self._new_architecture(index)
        return self._architectures[index]

    def _new_architecture(self, index: int) -> Architecture:
        if self.api is HIP:
            properties = torch.cuda.get_device_properties(index)
            return Architecture(properties.gcnArchName, properties.warp_size)
        device, major, minor = c_int(), c_int(), c_int()
        self.call("DeviceGet", byref(device), index)
        self.call("DeviceGetAttribute", byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        self.call("DeviceGetAttribute", byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        return Architecture(f"sm_{major.value}{minor.value}")

    def in_context(self, index: int, name: str, *arguments):
        """Runs `call` in the context that torch uses on a device, whatever the current device."""
        leave = self._enter_cuda(index) if self.api is CUDA else self._enter_hip(index)
        try:
            self.call(name, *arguments)
        finally:
            if leave is not None:
                self.call(*leave)

    def _enter_cuda(self, index: int) -> tuple:
        """Makes a device's context the current one. Returns what to call afterwards."""
        if index not in self._contexts:
            device, context = c_int(), c_void_p()
            self.call("DeviceGet", byref(device), index)
            self.call("DevicePrimaryCtxRetain", byref(context), device)
            self._contexts[index] = context
        self.call("CtxPushCurrent_v2", self._contexts[index])
        return "CtxPopCurrent_v2", byref(c_void_p())

    def _enter_hip(self, index: int) -> tuple | None:
        """Makes a device the current one, and returns as `_enter_cuda`; None: nothing."""
        current = c_int()
        self.call("GetDevice", byref(current))
        if current.value == index:
            return None
        self.call("SetDevice", index)
        return "SetDevice", current


class Module:
    """Compiled kernels, loaded on one device.

    Args:
        driver: That loads them.
        index: Of the device.
        image: What `Compiler.compile` returned.
    """

    def __init__(self, driver: Driver, index: int, image: bytes):
        self._driver, self._index = driver, index
        self._module = c_void_p()
        self._functions: dict[str, c_void_p] = {}
        driver.in_context(index, "ModuleLoadData", byref(self._module), image)

    def launch(self, name: str, blocks: tuple[int, ...], threads: tuple[int, ...], stream: int,
               *arguments):
        """Starts a kernel.

        Args:
            name: Of the kernel in the source.
            blocks: In the grid, in up to three dimensions.
            threads: Per block, in up to three dimensions.
            stream: A CUstream or hipStream_t.
            arguments: ctypes values of the kernel's parameter types.
        """
        if name not in self._functions:
            function = c_void_p()
            self._driver.in_context(self._index, "ModuleGetFunction", byref(function),
                                    self._module, name.encode())
            self._functions[name] = function
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        dimensions = [*(*blocks, 1, 1)[:3], *(*threads, 1, 1)[:3]]
        self._driver.in_context(self._index, self._driver.api.launch, self._functions[name],
                                *dimensions, 0, stream, addresses, None)
