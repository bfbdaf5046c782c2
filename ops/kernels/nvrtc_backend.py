"""Kernels for CUDA without Triton, such as portable ComfyUI on Windows: CUDA C++ in `source/`,
compiled where it runs."""
import functools
import math
from collections.abc import Callable
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass

import torch

from ..format import Format
from .kernel import Backend, Kernel
from .kernel_source import addresses, dequantize_and_linear, kernel_source
from .nvrtc import Compiler, CudaError, Driver, Module, nvrtc_libraries
from .validation import probe

CHUNK = 8  # values a thread handles at a time, LANES in source/cuda
DEQUANTIZE_THREADS = 256
LINEAR_THREADS = 128
# The most tokens "linear" takes -> rows of the weight that a warp takes. More rows load the input
# fewer times, but leave fewer warps to hide the time of a load.
LINEAR_ROWS = {1: 1, 4: 2, 16: 2}
WARP = 32
INPUT_ALIGNMENT = 16


@dataclass(frozen=True)
class Program:
    """One kernel of `source/cuda`, "dequantize" or "linear", for one format.

    dtype: of the values for "dequantize", of input and output for "linear". value_dtype: see
    `Kernel`. alignment: of the packed bytes' address, 1, 2 or 4. tokens: the most that "linear"
    takes; rows: of the weight, for each of its warps.
    """
    kernel: str
    packed_format: type[Format]
    dtype: torch.dtype
    value_dtype: torch.dtype | None = None
    alignment: int = 1
    tokens: int = 1
    rows: int = 1

    def source(self) -> str:
        """CUDA C++."""
        if self.packed_format.block_length % CHUNK:
            raise CudaError(
                f"blocks of {self.packed_format.block_length} values are not made of chunks of"
                f" {CHUNK}"
            )
        return kernel_source("cuda", self.kernel, self.packed_format, self.dtype, self.value_dtype,
                             ALIGNMENT=self.alignment, TOKENS=self.tokens, ROWS=self.rows)


class CudaKernels:
    """Compiles a program for a device when it is first used there, and starts it on torch's current
    stream."""

    def __init__(self, compiler: Compiler, driver: Driver):
        self._compiler, self._driver = compiler, driver
        self._modules: dict[tuple[int, Program], Module] = {}

    def _launch(self, program: Program, blocks: int, threads: int, device: torch.device,
                *arguments):
        index = device.index or 0
        key = index, program
        if key not in self._modules:
            image = self._compiler.compile(program.source(), self._driver.capability(index))
            self._modules[key] = Module(self._driver, index, image)
        self._modules[key].launch(program.kernel, blocks, threads,
                                  torch.cuda.current_stream(device).cuda_stream, *arguments)

    def dequantize(self, packed_format, tensors, out, value_dtype, first):
        """See `Kernel.run`."""
        chunks, rest = divmod(out.numel(), CHUNK)
        if rest or not chunks:  # small weights of odd shapes, and lookups of no rows
            packed_format.dequantize_into(tensors, out, value_dtype, first)
            return
        tensors = _aligned(packed_format, tensors)
        packed, scales = addresses(packed_format, tensors, first)
        program = Program("dequantize", packed_format, out.dtype, value_dtype,
                          alignment(packed_format))
        self._launch(program, -(-chunks // DEQUANTIZE_THREADS), DEQUANTIZE_THREADS, out.device,
                     c_void_p(packed), c_void_p(scales), c_void_p(out.data_ptr()),
                     c_longlong(chunks))

    def linear(self, most_tokens, packed_format, tensors, input, addend, out, value_dtype):
        """See `Kernel.run`; for up to `most_tokens` tokens, one of `LINEAR_ROWS`."""
        if input.data_ptr() % INPUT_ALIGNMENT:
            input = input.clone()
        (tokens, columns), rows = input.shape, out.shape[1]
        rows_of_warp = LINEAR_ROWS[most_tokens]
        tensors = _aligned(packed_format, tensors)
        packed, scales = addresses(packed_format, tensors)
        addend_address, strides = (
            (None, (0, 0)) if addend is None else (addend.data_ptr(), addend.stride())
        )
        program = Program("linear", packed_format, out.dtype, value_dtype, alignment(packed_format),
                          most_tokens, rows_of_warp)
        self._launch(program, -(-rows // (rows_of_warp * LINEAR_THREADS // WARP)), LINEAR_THREADS,
                     out.device, c_void_p(input.data_ptr()), c_void_p(packed), c_void_p(scales),
                     c_void_p(addend_address), c_void_p(out.data_ptr()), c_int(tokens), c_int(rows),
                     c_int(columns), *map(c_longlong, strides))


def alignment(packed_format: type[Format]) -> int:
    """What every block's address is a multiple of, at most 4, where the first one's is."""
    return math.gcd(packed_format.block_bytes, 4)


def _aligned(packed_format: type[Format], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a weight, the packed bytes copied if they lie at an odd address: so one
    program is for all addresses."""
    return (
        tensors
        if tensors[0].data_ptr() % alignment(packed_format) == 0
        else [tensors[0].clone(), *tensors[1:]]
    )


@functools.cache
def _kernels() -> CudaKernels:
    if torch.version.cuda is None:
        raise CudaError("this torch is not built for CUDA")
    driver = Driver()
    reasons = []
    for library in nvrtc_libraries():
        try:
            return CudaKernels(Compiler(library), driver)
        except (OSError, AttributeError, CudaError) as error:
            reasons.append(f"{library}: {error}")
    raise CudaError("; ".join(reasons)
                    or "NVRTC is neither in torch nor in a package nvidia-cuda-nvrtc")


def kernel_table(kernels: Callable[[], CudaKernels]) -> tuple[Kernel, ...]:
    """The kernels as data. kernels: called when one runs."""
    return dequantize_and_linear(kernels, LINEAR_ROWS)


BACKEND = Backend("nvrtc", lambda device: probe(_kernels().dequantize, device),
                  kernel_table(_kernels))
