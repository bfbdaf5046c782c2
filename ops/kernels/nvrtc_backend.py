"""Kernels for CUDA without Triton, such as portable ComfyUI on Windows: CUDA C++ in `cuda/`, compiled where it runs."""
import functools
from ctypes import c_int, c_longlong, c_void_p
from pathlib import Path

import torch

from ..format import FORMATS, Format
from . import Backend, Kernel
from .nvrtc import Compiler, CudaError, Driver, Module, nvrtc_libraries

SOURCES = Path(__file__).with_name("cuda")
TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
THROUGH = {None: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMAT_NAMES = frozenset((
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Codebook4Bit"))
CHUNK = 8  # values a thread handles at a time
UNPACK_THREADS = 256
LINEAR_THREADS = 128
# tokens at most -> rows of the weight that a warp takes, as in kernels.cu
LINEAR_ROWS = {1: 1, 4: 2, 16: 4}


def source(packed_format: type[Format], dtype: torch.dtype) -> str:
    """CUDA C++ of the kernels of one format and one type of activations."""
    if packed_format.block_length % CHUNK:
        raise CudaError(f"blocks of {packed_format.block_length} values are no whole chunks of {CHUNK}")
    definitions = {
        "FORMAT": next(base.__name__ for base in packed_format.__mro__ if base.__name__ in FORMAT_NAMES),
        "BLOCK_LENGTH": packed_format.block_length, "BLOCK_BYTES": packed_format.block_bytes, "TYPE": TYPES[dtype],
    }
    codebook = getattr(packed_format, "codebook", None) or getattr(packed_format, "values", None)
    if codebook:
        exact = torch.tensor(codebook, dtype=torch.float32).tolist()
        definitions["CODEBOOK"] = ", ".join(f"{value.hex()}f" for value in exact)
    family = packed_format.__module__.rpartition(".")[2]
    return "\n".join((*(f"#define {name} {value}" for name, value in definitions.items()),
                      *(SOURCES.joinpath(f"{name}.cu").read_text(encoding="utf-8") for name in ("chunks", family, "kernels"))))


class CudaKernels:
    """Compiles a format's kernels for a device when they are first used there, and starts them on torch's current stream."""

    def __init__(self, compiler: Compiler, driver: Driver):
        self._compiler, self._driver = compiler, driver
        self._modules: dict[tuple[int, str, torch.dtype], Module] = {}

    def _module(self, index: int, packed_format: type[Format], dtype: torch.dtype) -> Module:
        key = index, packed_format.__name__, dtype
        if key not in self._modules:
            image = self._compiler.compile(source(packed_format, dtype), self._driver.capability(index))
            self._modules[key] = Module(self._driver, index, image)
        return self._modules[key]

    def _launch(self, name, blocks, threads, packed_format, out, *arguments):
        module = self._module(out.get_device(), packed_format, out.dtype)
        module.launch(name, blocks, threads, torch.cuda.current_stream(out.device).cuda_stream, *arguments)

    def unpack(self, packed_format, tensors, out, value_dtype, first):
        """See `Kernel.run`."""
        chunks, rest = divmod(out.numel(), CHUNK)
        if rest:
            packed_format.unpack_into(tensors, out, value_dtype, first)
            return
        packed, scales = _pointers(packed_format, tensors, first)
        self._launch("unpack", -(-chunks // UNPACK_THREADS), UNPACK_THREADS, packed_format, out,
                     packed, scales, c_void_p(out.data_ptr()), c_longlong(chunks), c_int(THROUGH[value_dtype]))

    def linear(self, most, packed_format, tensors, input, addend, out, value_dtype):
        """See `Kernel.run`; for up to `most` tokens."""
        tokens, columns = input.shape
        rows = out.shape[1]
        packed, scales = _pointers(packed_format, tensors)
        token_stride, row_stride = (0, 0) if addend is None else addend.stride()
        self._launch(f"linear_{most}", -(-rows // (LINEAR_ROWS[most] * LINEAR_THREADS // 32)), LINEAR_THREADS, packed_format, out,
                     c_void_p(input.data_ptr()), packed, scales, c_void_p(None if addend is None else addend.data_ptr()),
                     c_void_p(out.data_ptr()), c_int(tokens), c_int(rows), c_int(columns), c_int(token_stride),
                     c_int(row_stride), c_int(THROUGH[value_dtype]))


def _pointers(packed_format, tensors, first=0) -> tuple[c_void_p, c_void_p]:
    """Addresses of block `first` and of its scale; the latter null where the blocks hold their scales."""
    scales = tensors[1].data_ptr() + first * tensors[1].itemsize if len(tensors) > 1 else None
    return c_void_p(tensors[0].data_ptr() + first * packed_format.block_bytes), c_void_p(scales)


@functools.cache
def _kernels() -> CudaKernels:
    reasons = []
    for library in nvrtc_libraries():
        try:
            return CudaKernels(Compiler(library), Driver())
        except (OSError, AttributeError, CudaError) as error:
            reasons.append(f"{library}: {error}")
    raise CudaError("; ".join(reasons) or "NVRTC is neither in torch nor in a package nvidia-cuda-nvrtc-cu12")


def probe(device: torch.device):
    """Unpacks one block."""
    packed_format = FORMATS["Q8_0"]
    block = torch.zeros(packed_format.block_bytes, dtype=torch.uint8, device=device)
    out = torch.full((packed_format.block_length,), torch.nan, device=device)
    _kernels().unpack(packed_format, [block], out, None, 0)
    if out.any():
        raise CudaError("a block of zeros was unpacked to something else")


def _unpack(*arguments):
    _kernels().unpack(*arguments)


def _linear(most, *arguments):
    _kernels().linear(most, *arguments)


def _kernel_table(unpack, linear) -> tuple[Kernel, ...]:
    dtypes = frozenset(TYPES)
    least = dict(zip(LINEAR_ROWS, (1, *(most + 1 for most in LINEAR_ROWS))))
    return (Kernel("unpack", FORMAT_NAMES, dtypes, unpack),
            *(Kernel("linear", FORMAT_NAMES, dtypes, functools.partial(linear, most), least[most], most)
              for most in LINEAR_ROWS))


BACKEND = Backend("nvrtc", probe, _kernel_table(_unpack, _linear))
