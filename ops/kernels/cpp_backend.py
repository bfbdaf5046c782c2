"""Kernels for CPUs: C++ in `source/`, compiled by the machine's own compiler or by the package
ziglang, where there is one.

A kernel takes half a second to compile and is kept for later runs in a folder that only this user
can write to. The file's name contains the digest of its bytes, because a damaged library would end
the process. Without a compiler torch does the work.
"""
import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from ctypes import c_float, c_int, c_longlong, c_void_p
from pathlib import Path

import torch

from ...child_process import run_process
from .. import cpu_features
from ..formats.base import Format, Grid
from ..formats.comfy_quant import E2M1
from ..formats.row_layout import RowFormat
from ..quantize.column_order import SWEEPS
from ..quantize.grid_error_feedback import columns_at_a_time
from ..quantize.row_encoder import RowEncoder
from .kernel import Backend, CompilerError, Kernel, block_length, compiler_error
from .kernel_source import (
    C_TYPES,
    CODES,
    DITHER,
    FORMAT_NAMES,
    MULTIPLIED,
    PLAIN,
    c_floats,
    dequantize_and_linear,
    kernel_source,
    late_bound_method,
    scale_group,
    weight_argument,
)
from .private_files import (
    cache_folder,
    keep,
    kept,
    private_folder,
    remove_oldest,
    temporary_folder,
)
from .validation import probe

COMPILERS = ("c++", "g++", "clang++")  # after the environment variable CXX, and before ziglang
# Products and sums must not be contracted: the values have the reference's bits.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-exceptions", "-fPIC",
         "-shared", "-w")
X86_FLAGS = ("-mprefer-vector-width=512",)  # compilers for other machines refuse it
XCODE = ("/Library/Developer/CommandLineTools", "/Applications/Xcode.app")
OPENMP = "-fopenmp"  # tried once: Apple's Clang does not know it, and Zig lacks its library
# elsewhere a linker does so unasked
NO_MISSING = () if sys.platform in ("win32", "darwin") else ("-Wl,-z,defs",)
OPENMP_SOURCE = """extern "C" int sum(int count) {
    int total = 0;
#pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < count; i++) total += i;
    return total;
}
"""
NO_COMPILER = ("there is no C++ compiler; the package ziglang is one, with which products are"
               " up to 15 times as fast")
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Of the variants of "linear". With more tokens the product of a dequantised weight is faster.
MAX_TOKENS = (1, 4)
MAX_BFLOAT16_TOKENS = 1024  # of the one for AVX512-BF16
MAX_TAPS = 64  # of a convolution whose weights "channels_last" transposes in a core's cache
# A compiler that takes longer is ended, and torch does the work. At first Zig makes its own
# libraries: for Windows in a minute on two fast cores.
COMPILE_SECONDS = 600
SCRATCH_PREFIX = "tmp"  # of folders in which a compiler works
MAX_LIBRARIES = 1000  # that are kept; all kernels in one dtype are about 250
STALE_SECONDS = 10 * COMPILE_SECONDS  # an older scratch folder was left by a killed process
OTHER_TEMPORARY = ("/var/tmp",)  # tried where the default temporary folder does not work
VALUES_PER_THREAD = 1 << 16  # a thread with less to do takes longer to start than to finish


def cpp_compiler() -> tuple[str, ...] | None:
    """Returns the command of a C++ compiler, None where there is none.

    On Windows only Zig is used: Visual C++ knows no vectors, and what GCC makes there keeps those
    of AVX on a stack that is not aligned for them.
    """
    names = () if sys.platform == "win32" else (os.environ.get("CXX"), *COMPILERS)
    paths = filter(None, map(shutil.which, filter(None, names)))
    path = next((path for path in paths if not _is_stub(path)), None)
    return (path,) if path else zig()


def _is_stub(path: str) -> bool:
    """Returns whether a compiler is macOS's offer to install Xcode's."""
    return (sys.platform == "darwin" and path.startswith("/usr/bin/")
            and not any(map(os.path.exists, XCODE)))


def zig() -> tuple[str, ...] | None:
    """Returns the command of the compiler in the package ziglang, None where that is missing."""
    spec = importlib.util.find_spec("ziglang")
    folders = (spec and spec.submodule_search_locations) or ()
    files = (Path(folder, "zig.exe" if sys.platform == "win32" else "zig") for folder in folders)
    path = next(filter(Path.is_file, files), None)
    # Zig would take a minute to make a library of C++, which kernels do not use.
    return (str(path), "c++", "-nostdlib++") if path else None


def install_advice() -> str:
    """Returns how to get a compiler, with the path of this Python."""
    return f'"{sys.executable}" -m pip install ziglang'


class CppCompiler:
    """Compiles sources to libraries, which it keeps and loads.

    Args:
        command: Of a C++ compiler that takes the options of GCC.
        folder: Where compiled kernels are kept.
    """

    def __init__(self, command: tuple[str, ...], folder: Path):
        self.command = command
        self._flags = (*FLAGS, *(X86_FLAGS if cpu_features.is_x86() else ()))
        if sys.platform == "darwin" and not cpu_features.is_x86():  # Clang's default there
            self._flags = tuple(flag for flag in self._flags if flag != "-march=native")
        self._openmp: tuple[str, ...] | None = None  # its option, where the compiler has that
        option = "version" if command[1:] else "--version"  # Zig's is not its compiler's
        version = run_process(command[0], option, seconds=COMPILE_SECONDS).stdout
        self._machine = f"{version} {self._flags} {_cpu()}"
        # Of these the first that libraries can be loaded from: a drive may refuse to run what is
        # on it.
        self._folders: list[Callable[[], Path]] = [
            lambda: private_folder(folder),
            *(functools.partial(temporary_folder, parent) for parent in (None, *OTHER_TEMPORARY)),
        ]

    def library(self, source: str) -> ctypes.CDLL:
        """Returns a source's functions. It is compiled once for each compiler and CPU model.

        Raises:
            CompilerError
        """
        name = hashlib.sha256(f"{self._machine}\n{source}".encode()).hexdigest()[:32]
        folders, errors = self._folders, []
        for index, folder in enumerate(folders):
            try:
                library = ctypes.CDLL(str(self._file(folder(), name, source)))
            except OSError as error:
                errors.append(str(error))
            else:
                self._folders = folders[index:]
                return library
        raise CompilerError(
            f"no folder can be written and run from; XDG_CACHE_HOME names another one:"
            f" {'; '.join(errors)}"
        )

    def _file(self, folder: Path, name: str, source: str) -> Path:
        """Returns the compiled library, and compiles it first where it is missing or damaged.

        Raises:
            SourceError: The compiler found a fault in the source.
            CompilerError: It failed otherwise.
            OSError: The folder cannot be used.
        """
        if path := kept(folder, name, SUFFIX):
            return path
        _remove_stale(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH_PREFIX,
                                         ignore_cleanup_errors=True) as scratch:
            if self._openmp is None:
                error = self._build(Path(scratch, "openmp.cpp"), OPENMP_SOURCE, OPENMP,
                                    *NO_MISSING)
                if error and (without := self._build(Path(scratch, "openmp.cpp"), OPENMP_SOURCE)):
                    raise CompilerError(f"{' '.join(self.command)}: {without}")
                self._openmp = () if error else (OPENMP,)
            file = Path(scratch, "kernel.cpp")
            if error := self._build(file, source, *self._openmp):
                raise compiler_error(file.name, error)(f"{' '.join(self.command)}: {error}")
            built = file.with_suffix(SUFFIX)
            built.chmod(0o700)
            return keep(folder, name, SUFFIX, built)

    def _build(self, file: Path, source: str, *flags: str) -> str:
        """Writes a source to `file`, in the folder in which the compiler works, and compiles it to
        a library there. Zig keeps beside that folder what it makes of its own libraries.

        Returns:
            Why the compiler refused it, "" if it did not.
        """
        file.write_text(source, encoding="utf-8")
        scratch = ("TMPDIR", "TEMP", "TMP", "ZIG_LOCAL_CACHE_DIR")
        environment = {**os.environ, "LC_ALL": "C", **dict.fromkeys(scratch, str(file.parent)),
                       "ZIG_GLOBAL_CACHE_DIR": str(file.parent.with_name("zig"))}
        process = run_process(*self.command, *self._flags, *flags, str(file), "-o",
                              str(file.with_suffix(SUFFIX)), seconds=COMPILE_SECONDS,
                              env=environment)
        if not process.returncode:
            return ""
        # from the line with the first error on: GCC's notes come before it
        start = process.stderr.rfind("\n", 0, max(0, process.stderr.find("error"))) + 1
        return process.stderr[start:start + 2000] or "it failed"


def _remove_stale(folder: Path):
    """Removes the oldest of too many libraries, and the scratch folders of processes that were
    killed while they compiled."""
    remove_oldest(folder, SUFFIX, MAX_LIBRARIES)
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            if time.time() - scratch.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


class Operand(ctypes.Structure):
    """A tensor of four dimensions in source/cpu/attention.cpp."""
    _fields_ = [("values", c_void_p), *((f"stride_{index}", c_longlong) for index in range(4))]


class Attention(ctypes.Structure):
    """`Attention` of source/cpu/attention.cpp."""
    _fields_ = [
        *((name, Operand) for name in ("query", "key", "value", "out", "mask")),
        *((name, c_int) for name in ("batches", "heads", "key_heads", "queries", "keys", "width",
                                     "value_width")), ("scale", c_float)]


class RowOperands(ctypes.Structure):
    """`Rows` of source/cpu/pack_row_columns.cpp."""
    _fields_ = [*((name, c_void_p) for name in ("values", "codes", "scales", "row_scales")),
                *((f"{name}_stride", c_longlong) for name in ("value", "code", "scale"))]


def _compiler_version() -> str:
    """Returns a text that differs where another compiler, or another CPU, is used."""
    command = cpp_compiler()
    changed = os.stat(command[0]).st_mtime_ns if command else ""
    return f"{command} {changed} {FLAGS} {_cpu()}"


def _cpu() -> str:
    """Returns a text that differs where `-march=native` may use other instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [
        f"{platform.machine()} {cpu_features.identifier()}"
        f" {torch.backends.cpu.get_cpu_capability()}"]
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return " ".join(sorted(features or lines[:1]))


class CpuKernels:
    """Compiles a kernel when it is first used, and runs it on torch's threads."""

    def __init__(self, compiler: CppCompiler):
        self._compiler = compiler
        self._functions: dict[tuple, Callable[..., None]] = {}
        self._of_sources: dict[str, Callable[..., None]] = {}
        self._compiling: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def _function(self, kernel: str, packed_format: Format | None, *dtypes,
                  **definitions) -> Callable[..., None]:
        key = kernel, packed_format, dtypes, *definitions.values()
        if key not in self._functions:
            source = kernel_source("cpu", kernel, packed_format, *dtypes, **definitions)
            with self._compiling[source]:
                if source not in self._of_sources:  # formats of rows of all lengths have one
                    self._of_sources[source] = getattr(self._compiler.library(source), kernel)
            self._functions[key] = self._of_sources[source]
        return self._functions[key]

    def dequantize(self, packed_format, tensors, out, first):
        """See `Kernel.run`."""
        lanes = _lanes(packed_format)
        if isinstance(packed_format, RowFormat):
            kernel, length = "dequantize_rows", packed_format.block_length
        else:
            kernel, length = "dequantize", 1
        count = out.numel()
        if not count or count % (lanes or 1) or count % length or not lanes:
            packed_format.dequantize_into(tensors, out, first)
            return
        run = self._function(kernel, packed_format, out.dtype, LANES=lanes)
        weight = weight_argument(packed_format, tensors, packed_format.block_length, first)
        run(ctypes.byref(weight), _address(out), c_longlong(count // length),
            c_int(_threads(count)))

    def linear(self, max_tokens, packed_format, tensors, input, addend, out):
        """See `Kernel.run`. max_tokens: the variant, one of `MAX_TOKENS`."""
        (tokens, columns), rows = input.shape, out.shape[1]
        run = self._function("linear", packed_format, torch.float32,
                             LANES=_lanes(packed_format), TOKENS=max_tokens)
        input = input.float()
        is_final = out.dtype == torch.float32 and addend is None
        sums = out if is_final else torch.empty(out.shape, dtype=torch.float32, device="cpu")
        weight = weight_argument(packed_format, tensors, columns)
        run(_address(input), ctypes.byref(weight), _address(sums), c_int(tokens), c_int(rows),
            c_int(_threads(rows * columns)))
        if addend is not None:
            sums += addend
        if sums is not out:
            out.copy_(sums)

    def linear_bfloat16(self, packed_format, tensors, input, addend, out):
        """See `Kernel.run`."""
        (tokens, columns), rows = input.shape, out.shape[1]
        run = self._function("linear_bfloat16", packed_format, out.dtype,
                             LANES=_lanes(packed_format))
        strides = (0, 0) if addend is None else addend.stride()
        weight = weight_argument(packed_format, tensors, columns)
        run(_address(input), ctypes.byref(weight), _address(addend), *map(c_longlong, strides),
            _address(out), c_int(tokens), c_int(rows), c_int(_threads(rows * columns)))

    def int8_rows(self, packed_format, tensors, codes, scales, first):
        """See `Kernel.run`."""
        rows, columns = codes.shape
        run = self._function("int8_rows", packed_format, torch.float32,
                             LANES=_lanes(packed_format), **CODES)
        weight = weight_argument(packed_format, tensors, columns, first)
        run(ctypes.byref(weight), _address(codes), _address(scales), c_longlong(rows),
            c_int(_threads(codes.numel())))

    def int8_tokens(self, input, codes, scales):
        """See `Kernel.run`."""
        run = self._function("int8_tokens", None, input.dtype, LANES=_max_lanes(), **CODES)
        rows, columns = codes.shape
        run(_address(input), _address(codes), _address(scales), c_longlong(rows), c_int(columns),
            c_int(_threads(codes.numel())))

    def channels_last(self, values, out):
        """See `Kernel.run`."""
        rows, channels, taps = values.shape
        if taps > MAX_TAPS:
            out.copy_(values.transpose(1, 2))
            return
        run = self._function("channels_last", None, out.dtype, LANES=_max_lanes(),
                             MAX_TAPS=MAX_TAPS, FROM_TYPE=C_TYPES[values.dtype])
        run(_address(values), _address(out), c_longlong(rows), c_int(channels), c_int(taps),
            c_int(_threads(out.numel())))

    def add_rounded(self, value, change):
        """See `Kernel.run`."""
        run = self._function("add_rounded", None, value.dtype, LANES=_max_lanes(), **DITHER,
                             IS_HALF=int(value.dtype == torch.float16))
        run(_address(value), _address(change), c_longlong(value.numel()),
            c_int(_threads(value.numel())))

    def attention(self, query, key, value, mask, scale, out):
        """See `Kernel.run`."""
        run = self._function("attention", None, out.dtype, LANES=_max_lanes())
        batch, heads, queries, width = query.shape
        _, key_heads, keys, value_width = value.shape
        sizes = batch, heads, key_heads, queries, keys, width, value_width
        masked = Operand() if mask is None else Operand(mask.data_ptr(), *mask.stride())
        operands = (Operand(operand.data_ptr(), *operand.stride())
                    for operand in (query, key, value, out))
        run(ctypes.byref(Attention(*operands, masked, *sizes, scale)),
            c_int(_threads(queries * keys * heads * batch)))

    def pack_blocks(self, packed_format, values, weights, fit, tries, rounds, sweeps, emphasis):
        """See `Kernel.run`."""
        run = self._function("pack_blocks", None, torch.float32, LANES=_max_lanes(),
                             **_grid_definitions(packed_format.grid))
        tensors = (values, weights, fit.codes, fit.d, fit.dmin, fit.scales, fit.minima)
        run(*map(_address, tensors), c_longlong(len(values)),
            *map(c_int, (tries, rounds, sweeps, emphasis)), c_int(_threads(values.numel())))

    def pack_columns(self, packed_format, values, shares, weights, chosen, tries, rounds):
        """See `Kernel.run`."""
        grid = packed_format.grid
        run = self._function("pack_columns", None, torch.float32, LANES=_max_lanes(),
                             **_grid_definitions(grid), COLUMNS=columns_at_a_time(grid))
        tensors = (values, shares, weights, chosen.levels, chosen.d, chosen.dmin, chosen.scales,
                   chosen.minima)
        columns, rows = values.shape
        run(*map(_address, tensors), c_int(columns), c_longlong(rows),
            *map(c_int, (tries, rounds, _threads(values.numel()))))

    def pack_rows(self, encoder, values, out):
        """See `Kernel.run`."""
        run = self._function("pack_rows", encoder.format, values.dtype, LANES=_max_lanes(),
                             **_code_definitions(encoder))
        shares, is_finite = encoder.shares(), c_int(1)
        run(*map(_address, (values, out.codes, out.scale, out.row_scale)),
            ctypes.byref(is_finite), (c_float * len(shares))(*shares), c_int(len(shares)),
            c_float(encoder.of_tensor), c_longlong(len(values)), c_int(values.shape[1]),
            c_int(_threads(values.numel())))
        if not is_finite.value:
            raise encoder.refusal(values)

    def pack_row_columns(self, encoder, rows, encoded, span, damped):
        """See `Kernel.run`."""
        values = rows[:, span]
        run = self._function("pack_row_columns", encoder.format, values.dtype, LANES=_max_lanes(),
                             **_code_definitions(encoder))
        if values.stride(1) != 1:
            values = values.contiguous()
        codes, scale = encoded.codes[:, encoder.bytes_of(span)], encoded.scale
        if scale.shape[1] > 1:
            scale = scale[:, span.start // encoder.layout.group:]
        strides = values.stride(0), codes.stride(0), scale.stride(0) * scale.itemsize
        operands = RowOperands(*map(_address, (values, codes, scale, encoded.row_scale)), *strides)
        shares, steps, weights = (
            part.contiguous() for part in (damped.shares, damped.steps, damped.weights))
        tried = encoder.shares()
        run(ctypes.byref(operands), *map(_address, (shares, steps, weights)),
            (c_float * len(tried))(*tried), c_int(len(tried)), c_int(values.shape[1]),
            c_int(SWEEPS), c_longlong(len(values)), c_int(_threads(values.numel())))


def _code_definitions(encoder: RowEncoder) -> dict:
    """Returns the constants that source/cpu/pack_codes.h needs."""
    layout = encoder.layout
    return {
        "SCALE_COLUMNS": 0 if layout.scale.kind == "f32" else layout.group,
        "LOWEST": c_floats([encoder.lowest]), "LARGEST": c_floats([encoder.largest]),
        "IS_E2M1": int(layout.codes.numbers == E2M1),
        "MIDDLES": c_floats(encoder.middles().tolist() if layout.codes.bits == 4 else ()),
    }


def _grid_definitions(grid: Grid) -> dict:
    """Returns the constants that source/cpu/pack.h needs."""
    lowest, highest = grid.scales or (1, 1)
    return {
        "LENGTH": grid.length,
        "GROUP": grid.group,
        "COUNT": len(grid.levels),
        "LEVELS": c_floats(grid.levels),
        "UNIFORM": int(grid.uniform),
        "SIGNED": int(grid.signed),
        "MINIMUM": int(grid.minimum),
        "INTEGERS": int(grid.scales is not None),
        "LOWEST_SCALE": lowest,
        "HIGHEST_SCALE": highest,
        "HALF_SCALES": int(grid.scale_dtype == torch.float16),
    }


def _address(tensor: torch.Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _max_lanes() -> int:
    return 16 if torch.cpu._is_avx512_supported() else 8


def _lanes(packed_format: Format) -> int:
    """Returns how many values of a block are handled at once, 0 where none of the numbers do."""
    length = multiple = block_length(packed_format)
    if isinstance(packed_format, RowFormat):
        # of other groups, a vector's values have scales of their own
        group = scale_group(packed_format.layout)
        multiple = math.gcd(length, group) if group % 8 == 0 else length
    limit = min(8 if packed_format.name == "NVFP4" else 16, _max_lanes())
    return next((lanes for lanes in (16, 8) if lanes <= limit and multiple % lanes == 0), 0)


def _threads(values: int) -> int:
    return max(1, min(torch.get_num_threads(), values // VALUES_PER_THREAD))


@functools.cache
def _kernels() -> CpuKernels:
    if (command := cpp_compiler()) is None:
        raise CompilerError(f"{NO_COMPILER}: {install_advice()}, then a restart")
    return CpuKernels(CppCompiler(command, cache_folder() / "kernels"))


def kernel_table(kernels: Callable[[], CpuKernels], has_bfloat16: bool) -> tuple[Kernel, ...]:
    """Returns the backend's kernels.

    Args:
        kernels: Called when one runs.
        has_bfloat16: Whether the CPU and what compiles the kernels have AVX512-BF16.
    """
    def kernel(name: str, formats: frozenset[str], *dtypes: torch.dtype) -> Kernel:
        return Kernel(name, formats, frozenset(dtypes), late_bound_method(kernels, name))

    no_format, halves = frozenset[str](), (torch.float16, torch.bfloat16)
    of_rows = frozenset((RowFormat.__name__,))  # only those that `RowEncoder` encodes are asked for
    by_avx512 = Kernel("linear", MULTIPLIED | PLAIN, frozenset([torch.bfloat16]),
                       late_bound_method(kernels, "linear_bfloat16"),
                       max_tokens=MAX_BFLOAT16_TOKENS)
    return (
        *([by_avx512] if has_bfloat16 else []),
        *dequantize_and_linear(kernels, MAX_TOKENS),
        kernel("int8_rows", MULTIPLIED, torch.int8),
        kernel("int8_tokens", no_format, *C_TYPES),
        kernel("channels_last", no_format, *C_TYPES),
        kernel("add_rounded", no_format, *halves),
        *([kernel("attention", no_format, *C_TYPES)] if cpu_features.is_x86() else []),
        kernel("pack_blocks", FORMAT_NAMES, torch.float32),
        kernel("pack_columns", FORMAT_NAMES, torch.float32),
        kernel("pack_rows", of_rows, *C_TYPES),
        kernel("pack_row_columns", of_rows, *C_TYPES),
    )


BACKEND = Backend("cpp", lambda device: probe(_kernels().dequantize, device),
                  kernel_table(_kernels, cpu_features.has_avx512_bfloat16()), lambda: _kernels(),
                  _compiler_version, "cpu", (Path(__file__),))
