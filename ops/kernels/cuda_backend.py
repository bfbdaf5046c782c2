"""Kernels for NVIDIA's and AMD's GPUs, whose devices torch calls "cuda": C++ in `source/`, compiled
at run time. The backend's name is that of the compiler, "nvrtc" or for ROCm "hiprtc"."""
import contextlib
import functools
import hashlib
import math
import tempfile
from collections.abc import Callable
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.base import Format
from ..formats.row_layout import RowFormat
from ..lasting_memory import cached_on_device, lasting_memory
from . import int8_codes, runtime_compiler
from .kernel import Backend, Kernel
from .kernel_source import (
    CHUNK,
    CODES,
    DITHER,
    MULTIPLIED,
    dequantize_and_linear,
    kernel_source,
    late_bound_method,
    row_grid,
    weight_argument,
)
from .private_files import cache_folder, keep, kept, private_folder, remove_oldest
from .runtime_compiler import (
    CUDA,
    HIP,
    Api,
    Architecture,
    Compiler,
    Driver,
    GpuError,
    Module,
    compiler_libraries,
    driver_libraries,
)
from .validation import probe

DEQUANTIZE_THREADS = 256
LINEAR_THREADS = 128
# Token limit of each variant of "linear" -> weight rows per warp. More rows load the input fewer
# times, but leave fewer warps to hide the latency of loads.
LINEAR_ROWS = {1: 1, 4: 2, 16: 2}
MAX_GRID_ROWS = 65535  # of blocks of threads; each takes several rows of a larger weight
INPUT_ALIGNMENT = 16  # bytes
TEAM, MAX_THREADS = 16, 256  # threads of "int8_rows" that share a group of columns; of a block
SUFFIX, MAX_IMAGES = ".image", 2000  # of compiled kernels that are kept


@dataclass(frozen=True)
class Program:
    """One kernel of `source/cuda` for one format.

    Attributes:
        kernel: "dequantize", "dequantize_rows", for formats of rows, "linear", "int8_rows" or
            "add_rounded".
        packed_format: Of the weight; None for "add_rounded".
        dtype: Of the values for "dequantize", of input and output for "linear" and "add_rounded";
            "int8_rows" computes in float32.
        alignment: Of the packed bytes' address: 1, 2 or 4.
        tokens: The most that "linear" takes.
        rows: Weight rows per warp of "linear".
    """
    kernel: str
    packed_format: Format | None
    dtype: torch.dtype
    alignment: int = 1
    tokens: int = 1
    rows: int = 1

    def source(self, architecture: Architecture) -> str:
        """Returns CUDA C++ or HIP. Raises GpuError for a block length that it cannot handle."""
        if self.packed_format is not None and self.packed_format.block_length % CHUNK:
            raise GpuError(f"blocks of {self.packed_format.block_length} values do not divide into"
                           f" chunks of {CHUNK}")
        return kernel_source("cuda", self.kernel, self.packed_format, self.dtype,
                             ALIGNMENT=self.alignment, TOKENS=self.tokens, ROWS=self.rows,
                             WARP=architecture.warp, **DITHER, **CODES)


class CudaKernels:
    """Compiles a program when it is first used on a device, and starts it on torch's stream.

    Args:
        compiler, driver: Of the device's vendor.
        folder: Where compiled kernels are kept, also for other processes.
    """

    def __init__(self, compiler: Compiler, driver: Driver, folder: Path):
        self._compiler = compiler
        self._folder = folder
        self._driver = driver
        self._modules: dict[tuple, Module] = {}
        self._of_sources: dict[tuple[int, str], Module] = {}

    def _launch(self, device: torch.device, blocks: tuple[int, ...], threads: tuple[int, ...],
                program: tuple, *arguments):
        """Starts a kernel. program: the arguments of `Program`."""
        index = device.index or 0
        module = self._modules.get((index, program))
        if module is None:
            architecture = self._driver.architecture(index)
            module = self._module(index, Program(*program).source(architecture), architecture)
            self._modules[index, program] = module
        module.launch(program[0], blocks, threads, current_stream(index), *arguments)

    def _module(self, index: int, source: str, architecture: Architecture) -> Module:
        """Returns a source's module; formats of rows of all lengths have one source."""
        if (index, source) not in self._of_sources:
            image = self._image(source, architecture)
            with lasting_memory():
                self._of_sources[index, source] = Module(self._driver, index, image)
        return self._of_sources[index, source]

    def _image(self, source: str, architecture: Architecture) -> bytes:
        """Returns what a source is compiled to: the process that checks kernels has kept it."""
        name = hashlib.sha256(repr(
            (self._compiler.version, self._compiler.options, architecture, source)
        ).encode()).hexdigest()[:32]
        with contextlib.suppress(OSError):
            if path := kept(private_folder(self._folder), name, SUFFIX):
                return path.read_bytes()
        image = self._compiler.compile(source, architecture.name)
        with contextlib.suppress(OSError):
            folder = private_folder(self._folder)
            remove_oldest(folder, SUFFIX, MAX_IMAGES)
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
                written = Path(scratch, name)
                written.write_bytes(image)
                keep(folder, name, SUFFIX, written)
        return image

    def dequantize(self, packed_format, tensors, out, first):
        """See `Kernel.run`."""
        of_rows = isinstance(packed_format, RowFormat)
        length = packed_format.block_length if of_rows else CHUNK
        count, rest = divmod(out.numel(), length)
        if rest or not count or length % CHUNK:  # a small weight of odd shape, or no rows at all
            packed_format.dequantize_into(tensors, out, first)
            return
        tensors = _aligned(packed_format, tensors)
        columns, padding = length, 0
        if not out.is_contiguous():
            columns, padding = out.shape[1], out.stride(0) - out.shape[1]
        weight = weight_argument(packed_format, tensors, columns, first)
        if of_rows:
            kernel = "dequantize_rows"
            (blocks, rows_of_blocks), threads = row_grid(packed_format, count)
            grid = blocks, min(rows_of_blocks, MAX_GRID_ROWS)
        else:
            kernel, threads = "dequantize", (DEQUANTIZE_THREADS,)
            grid = (-(-count // DEQUANTIZE_THREADS),)
        program = kernel, packed_format, out.dtype, alignment(packed_format)
        self._launch(out.device, grid, threads, program, weight, c_void_p(out.data_ptr()),
                     c_longlong(count), c_int(padding))

    def linear(self, max_tokens, packed_format, tensors, input, addend, out):
        """See `Kernel.run`. max_tokens: the variant, a key of `LINEAR_ROWS`."""
        (tokens, columns), rows = input.shape, out.shape[1]
        if input.data_ptr() % INPUT_ALIGNMENT:
            input = input.clone()
        rows_per_warp = LINEAR_ROWS[max_tokens]
        tensors = _aligned(packed_format, tensors)
        weight = weight_argument(packed_format, tensors, columns)
        addend_address = None if addend is None else addend.data_ptr()
        strides = (0, 0) if addend is None else addend.stride()
        program = ("linear", packed_format, out.dtype, alignment(packed_format), max_tokens,
                   rows_per_warp)
        warp = self._driver.architecture(out.device.index or 0).warp
        rows_per_block = rows_per_warp * LINEAR_THREADS // warp
        self._launch(out.device, (-(-rows // rows_per_block),), (LINEAR_THREADS,), program,
                     c_void_p(input.data_ptr()), weight, c_void_p(addend_address),
                     c_void_p(out.data_ptr()), c_int(tokens), c_int(rows),
                     *map(c_longlong, strides))

    def int8_rows(self, packed_format, tensors, codes, scales, first):
        """See `Kernel.run`."""
        rows, columns = codes.shape
        tensors = _aligned(packed_format, tensors)
        weight = weight_argument(packed_format, tensors, columns, first)
        # as few threads as take the row's groups in as few rounds, in whole warps
        groups, warp = columns // int8_codes.GROUP, self._driver.architecture(
            codes.device.index or 0).warp
        teams = -(-groups // -(-groups * TEAM // MAX_THREADS))
        self._launch(codes.device, (rows,), (-(-teams * TEAM // warp) * warp,),
                     ("int8_rows", packed_format, torch.float32, alignment(packed_format)),
                     weight, c_void_p(codes.data_ptr()), c_void_p(scales.data_ptr()))

    def add_rounded(self, value, change):
        """See `Kernel.run`."""
        if not value.numel():
            return
        chunks = -(-value.numel() // CHUNK)
        self._launch(value.device, (-(-chunks // DEQUANTIZE_THREADS),), (DEQUANTIZE_THREADS,),
                     ("add_rounded", None, value.dtype),
                     c_void_p(value.data_ptr()), c_void_p(change.data_ptr()),
                     c_longlong(value.numel()))


@functools.cache
def alignment(packed_format: Format) -> int:
    """Returns the alignment, at most 4 bytes, that whatever is loaded has if a weight's tensors
    have it: blocks, or eight codes of a row."""
    if isinstance(packed_format, RowFormat):
        return math.gcd(packed_format.layout.codes.bits, 4)
    return math.gcd(packed_format.block_bytes, 4)


def _aligned(packed_format: Format, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns a weight's tensors, each aligned, copied if need be, so that one program works for
    all addresses."""
    multiple = alignment(packed_format)
    for tensor in tensors:
        if tensor.data_ptr() % multiple:
            return [tensor.clone() if tensor.data_ptr() % multiple else tensor
                    for tensor in tensors]
    return tensors


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# of a device, as an address; Python's way to it takes as long as starting a kernel
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _current_stream)


@cached_on_device
def _kernels() -> CudaKernels:
    if API is CUDA and torch.version.cuda is None:
        raise GpuError("this torch is built neither for CUDA nor for ROCm")
    driver = _first_that_loads(Driver, driver_libraries(API), API)
    compiler = _first_that_loads(Compiler, compiler_libraries(API), API)
    return CudaKernels(compiler, driver, cache_folder() / "kernels")


def _first_that_loads(make: Callable[[str, Api], Any], libraries: list[str], api: Api) -> Any:
    """Returns what is made of the first library that works. Raises GpuError."""
    reasons = []
    for library in libraries:
        try:
            return make(library, api)
        except (OSError, AttributeError, GpuError) as error:
            reasons.append(f"{library}: {error}")
    raise GpuError("; ".join(reasons) or f"no library of {api.compiler} was found in torch and in"
                   f" the packages {', '.join(api.packages)}")


def kernel_table(kernels: Callable[[], CudaKernels]) -> tuple[Kernel, ...]:
    """Returns the backend's kernels. kernels: called when one runs."""
    add_rounded = Kernel("add_rounded", frozenset(), frozenset([torch.float16, torch.bfloat16]),
                         late_bound_method(kernels, "add_rounded"))
    int8_rows = Kernel("int8_rows", MULTIPLIED, frozenset([torch.int8]),
                       late_bound_method(kernels, "int8_rows"), is_untried=True)
    return *dequantize_and_linear(kernels, LINEAR_ROWS, takes_pitch=True), int8_rows, add_rounded


API = HIP if torch.version.hip else CUDA
BACKEND = Backend(API.compiler, lambda device: probe(_kernels().dequantize, device),
                  kernel_table(_kernels), lambda: _kernels(), platform="cuda",
                  files=(Path(__file__), Path(runtime_compiler.__file__)))
