"""Kernels for CPUs by the package ziglang, where no other compiler is installed. On Windows there
is no other, and `dev.py test --windows` runs these tests."""
import logging
import shutil
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    BASIC_FORMATS,
    DTYPES,
    ENCODED_ROWS,
    USUAL_ROWS,
    assert_same_bits,
    decide_on_demand,
    reference,
    row_format,
)
from pack_api import FORMATS, check, cpp_backend, random_tensors

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops import kernels as kernel_layer
from featherweight.ops.kernels import quantize_validation
from featherweight.ops.kernels.cpp_backend import CppCompiler, CpuKernels
from featherweight.ops.kernels.validation import WrongResult

CPU = torch.device("cpu")
ZIG = cpp_backend.zig()
# with AMX too, where another way is faster
HAS_BFLOAT16 = cpu_features._has("avx512_bf16", older=("_is_avx512_bf16_supported",))
# systems, and CPUs with the instructions that kernels have code of their own for
PLATFORMS = [
    ("x86_64-windows-gnu", "x86_64_v4+avx512bf16"), ("x86_64-windows-gnu", "x86_64_v3"),
    ("aarch64-windows-gnu", "generic"), ("x86_64-macos", "x86_64_v3"),
    ("aarch64-macos", "apple_m1"), ("aarch64-linux-gnu", "generic"),
]


pytestmark = pytest.mark.skipif(ZIG is None, reason="needs the package ziglang")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache, in which Zig has made its own libraries once for all tests."""
    return tmp_path_factory.mktemp("zig_cache")


@pytest.fixture
def only_zig(monkeypatch, tmp_path, cache):
    """A machine without another compiler, when ComfyUI starts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(kernel_layer.VARIABLE, raising=False)
    decide_on_demand(monkeypatch)
    cpp_backend._kernels.cache_clear()
    yield
    cpp_backend._kernels.cache_clear()


@pytest.fixture
def zig_kernels(only_zig, cache):
    """The backend's kernels, by Zig."""
    kernels = CpuKernels(CppCompiler(ZIG, cache / "featherweight" / "kernels"))
    return cpp_backend.kernel_table(lambda: kernels, HAS_BFLOAT16)


def test_other_compilers_come_first(monkeypatch, tmp_path):
    command = tmp_path / "g++"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpp_backend.cpp_compiler() == (str(command),)
    command.unlink()
    assert cpp_backend.cpp_compiler() == ZIG


def test_on_windows_no_other_is_used(monkeypatch, tmp_path):
    package = tmp_path / "ziglang"
    package.mkdir()
    for name in ("__init__.py", "zig.exe"):
        (package / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(cpp_backend.sys, "platform", "win32")
    assert cpp_backend.cpp_compiler() == (str(package / "zig.exe"), *ZIG[1:])


def test_on_a_mac_the_offer_to_install_xcode_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_backend.sys, "platform", "darwin")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cpp_backend, "XCODE", (str(tmp_path / "Xcode.app"),))
    assert cpp_backend.cpp_compiler() == ZIG
    (tmp_path / "Xcode.app").mkdir()
    assert cpp_backend.cpp_compiler() == ("/usr/bin/c++",)


# one kernel of each source file, and one format of each kind
KERNELS = [
    ("dequantize", "Q6_K", torch.float32), ("dequantize", "IQ2_XS", torch.bfloat16),
    ("dequantize", "INT8_CONVROT", torch.float16), ("linear", "Q4_K", torch.float32),
    ("linear", "Q8_0", torch.bfloat16), ("int8_rows", "Q8_0", torch.int8),
    ("int8_tokens", None, torch.float32), ("channels_last", None, torch.bfloat16),
    ("add_rounded", None, torch.float16),
    ("attention", None, torch.bfloat16), ("pack_blocks", "Q4_0", torch.float32),
    ("pack_columns", "Q4_0", torch.float32), ("pack_rows", "NVFP4_ROWS", torch.bfloat16),
    ("pack_rows", "INT8_CONVROT", torch.bfloat16),
    ("pack_row_columns", "W4A8", torch.bfloat16),
]


# what kernels of formats compute in, and those of none
DTYPES_OF = {
    "dequantize": DTYPES, "linear": (torch.float32, torch.bfloat16), "int8_rows": (torch.int8,),
    "pack_blocks": (torch.float32,), "pack_columns": (torch.float32,), "pack_rows": DTYPES,
    "pack_row_columns": DTYPES, "channels_last": DTYPES,
    "int8_tokens": DTYPES, "attention": DTYPES, "add_rounded": DTYPES[1:]
}
WITHOUT_FORMAT = ("channels_last", "int8_tokens", "attention", "add_rounded")


def check_case(table, capability, fmt, dtype):
    kernels = [kernel for kernel in table
               if kernel.capability == capability and kernel.accepts(fmt, dtype)]
    for kernel in kernels:
        check(kernel, fmt, dtype, CPU)
    return len(kernels)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("capability", "name", "dtype"), KERNELS, ids=str)
def test_its_kernels_are_right(zig_kernels, capability, name, dtype, monkeypatch):
    monkeypatch.setattr(quantize_validation, "SEVERAL_THREADS", 1 << 14)
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)
    fmt = name and (FORMATS[name] if name in FORMATS else row_format(name))
    assert check_case(zig_kernels, capability, fmt, dtype)


@pytest.mark.heavy
@pytest.mark.parametrize("capability", DTYPES_OF)
def test_all_its_kernels_are_right(zig_kernels, capability):
    """With every format of blocks, and with one of each family of rows."""
    formats = [None] if capability in WITHOUT_FORMAT else [*BASIC_FORMATS, *USUAL_ROWS]
    if capability.startswith("pack_row"):
        formats = list(ENCODED_ROWS.values())
    elif capability.startswith("pack"):
        formats = [fmt for fmt in formats if fmt.grid and fmt.block_length <= 256]
    counts = [check_case(zig_kernels, capability, fmt, dtype)
              for fmt in formats for dtype in DTYPES_OF[capability]]
    assert sum(counts) > len(formats) // 2  # rotated rows are not multiplied


@pytest.mark.usefixtures("only_zig")
def test_a_cpu_uses_it_unasked_and_writes_into_the_packs_cache_alone(caplog, tmp_path, cache):
    caplog.set_level(logging.INFO)
    fmt = FORMATS["Q6_K"]
    tensors = random_tensors(fmt, 8, CPU)
    out = torch.empty(8 * fmt.block_length)
    assert kernel_layer.find("dequantize", CPU, fmt, out.dtype) is not None
    assert_same_bits(kernel_layer.dequantize_into(fmt, tensors, out), reference(fmt, tensors))
    assert "Packed weights on cpu use cpp" in caplog.text
    assert (cache / "featherweight" / "kernels" / "zig").is_dir()
    assert not (tmp_path / "home").exists()


class CompilerFor:
    """Replaces `CppCompiler`: compiles for another system, and loads nothing.

    Args:
        target: As Zig names it.
        cpu: Its instructions.
        folder: Where it works.
    """

    def __init__(self, target: str, cpu: str, folder: Path):
        self._compiler = CppCompiler((*ZIG, "-target", target), folder)
        flags = [f"-mcpu={cpu}" if flag == "-march=native" else flag
                 for flag in self._compiler._flags]
        if not target.startswith("x86_64"):
            flags = [flag for flag in flags if flag not in cpp_backend.X86_FLAGS]
        self._compiler._flags = tuple(flags)
        self.compiled = 0
        self.folder = folder

    def library(self, source):
        error = self._compiler._build(self.folder / "kernel.cpp", source)
        assert not error, error
        self.compiled += 1
        return self

    def __getattr__(self, name):
        return lambda *arguments: None


@pytest.mark.heavy
@pytest.mark.parametrize(("target", "cpu"), PLATFORMS)
def test_its_kernels_compile_for_other_systems(target, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: "v4" in cpu)
    compiler = CompilerFor(target, cpu, tmp_path)
    kernels = CpuKernels(compiler)
    table = cpp_backend.kernel_table(lambda: kernels, "bf16" in cpu)
    for capability, name, dtype in KERNELS:
        fmt = name and (FORMATS[name] if name in FORMATS else row_format(name))
        with pytest.raises(WrongResult):
            check_case(table, capability, fmt, dtype)
    assert compiler.compiled >= len(KERNELS)
