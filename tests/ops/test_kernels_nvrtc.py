"""The CUDA sources compile for every GPU without one, and give the reference's values: run on the CPU, by the same Python."""
import logging
import os
import shutil
import subprocess
import sys
import types
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from featherweight.ops import formats, product  # noqa: F401
from featherweight.ops import kernels as kernel_layer
from featherweight.ops.format import FORMATS
from featherweight.ops.kernels import nvrtc, nvrtc_backend
from featherweight.ops.kernels.check import check, probe, random_tensors
from featherweight.ops.kernels.nvrtc import Compiler, CudaError, Driver
from featherweight.ops.kernels.nvrtc_backend import LINEAR_ROWS, Program, alignment
from featherweight.ops.kernels.cxx_text import SOURCES, source_files
from kernel_cases import (
    ALL_FORMATS, DTYPES, assert_a_weak_lora_arrives, assert_layer_equals_the_dense_one, assert_odd_weight_is_right,
    assert_product_rounds_once, assert_same_bits, each_dtype, each_format, each_format_with, reference, wait_for_kernels,
)

ON_CPU = Path(__file__).with_name("cuda_on_cpu")
CPP = os.environ.get("CXX") or shutil.which("g++")
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
ELF = b"\x7fELF"
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
        # A load from an address that a GPU refuses ends the process.
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment,bounds",
                 "-fsanitize-undefined-trap-on-error", "-w", "-fPIC", "-shared"]
        built = subprocess.run([CPP, *flags, f"-I{ON_CPU}", str(source), "-o", str(library), "-ldl"],
                               capture_output=True, text=True)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_format_with("dtype", DTYPES)
def test_unpack_equals_the_reference_rounded_once(on_cpu, fmt, dtype):
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 600, torch.device("cpu"))
    expected = reference(fmt, tensors)
    out = torch.empty(len(expected), dtype=dtype)
    on_cpu.unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, expected.to(dtype))


@each_format_with("dtype", DTYPES)
def test_unpack_starts_at_any_block_and_writes_to_any_address(on_cpu, fmt, dtype):
    tensors = random_tensors(fmt, 6, torch.device("cpu"), calm=True)
    expected = fmt.unpack_into(tensors, torch.empty(3 * fmt.block_length - 8, dtype=dtype), first=2)
    out = torch.empty(len(expected) + 2, dtype=dtype)
    on_cpu.unpack(fmt, tensors, out[1:-1], None, 2)
    assert_same_bits(out[1:-1], expected)


@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["Q5_0"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_unpack_reads_from_any_address(on_cpu, fmt):
    tensors = random_tensors(fmt, 6, torch.device("cpu"))
    expected = fmt.unpack_into(tensors, torch.empty(6 * fmt.block_length))
    for offset in (1, 2):
        moved = torch.zeros(tensors[0].numel() + offset, dtype=torch.uint8)[offset:]
        moved.copy_(tensors[0].flatten())
        out = torch.empty_like(expected)
        on_cpu.unpack(fmt, [moved, *tensors[1:]], out, None, 0)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(7, 72), (5, 45), (0, 64)], ids=str)
def test_unpack_of_odd_weights_and_of_none(on_cpu, shape):
    assert_odd_weight_is_right(on_cpu.unpack, shape)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", [FORMATS["Q6_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_unpack_rounds_to_the_value_dtype_first(on_cpu, fmt, value_dtype):
    tensors = random_tensors(fmt, 40, torch.device("cpu"))
    out = torch.empty(40 * fmt.block_length)
    on_cpu.unpack(fmt, tensors, out, value_dtype, 0)
    assert_same_bits(out, fmt.unpack_into(tensors, torch.empty_like(out), value_dtype))


def kernels_of(on_cpu, op):
    return [kernel for kernel in nvrtc_backend.kernel_table(lambda: on_cpu) if kernel.capability == op]


@each_format
def test_product_with_one_row_is_right(on_cpu, fmt):
    check(kernels_of(on_cpu, "linear")[0], fmt, torch.bfloat16, None, torch.device("cpu"))


@each_dtype
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16])
def test_product_sums_in_float32_and_rounds_once(on_cpu, tokens, dtype):
    assert_product_rounds_once(kernels_of(on_cpu, "linear"), tokens, dtype, offset=1)  # loads of four bytes and more


def test_each_number_of_rows_up_to_16_has_one_product():
    for tokens in range(1, 17):
        assert sum(kernel.takes(tokens) for kernel in kernels_of(None, "linear")) == 1
    assert not any(kernel.takes(17) for kernel in kernels_of(None, "linear"))


@pytest.mark.skipif(find_spec("nvidia") is None or find_spec("nvidia.cuda_nvrtc") is None, reason="no nvidia-cuda-nvrtc-cu12")
def test_nvrtc_is_found_in_its_package():
    assert any("cuda_nvrtc" in library for library in nvrtc.nvrtc_libraries())


@pytest.mark.parametrize("on_windows, files, found", [
    (True, ["torch/lib/nvrtc64_120_0.dll", "torch/lib/nvrtc64_120_0.alt.dll", "torch/lib/nvrtc-builtins64_128.dll"], [0]),
    (True, ["torch/c10.dll", "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll", "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll"], [2, 1]),
    (False, ["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.alt.so.13",
             "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9"], [1, 0]),
], ids=["Windows, in torch", "Windows, in packages", "Linux, in packages"])
def test_nvrtc_of_torchs_version_comes_first(on_windows, files, found, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(nvrtc, "ON_WINDOWS", on_windows)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    packages = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: packages)
    system = [] if on_windows else ["libnvrtc.so.12"]
    assert nvrtc.nvrtc_libraries() == [*(str(tmp_path / files[index]) for index in found), *system]


@each_format_with("capability", CAPABILITIES)
def test_every_source_compiles_for_every_gpu(compiler, fmt, capability):
    if capability not in compiler.architectures:
        pytest.skip(f"NVRTC {compiler.version} does not know compute capability {capability / 10}")
    for kernel in ("unpack", "linear"):
        program = Program(kernel, fmt, torch.bfloat16, None, alignment(fmt))
        assert compiler.compile(program.source(), capability).startswith(ELF)


@each_dtype
@each_capability
def test_every_type_and_number_of_rows_compiles_for_every_gpu(compiler, capability, dtype):
    if capability not in compiler.architectures:
        pytest.skip(f"NVRTC {compiler.version} does not know compute capability {capability / 10}")
    programs = [Program("linear", FORMATS["Q6_K"], dtype, None, 2, tokens, rows) for tokens, rows in LINEAR_ROWS.items()]
    for program in [*programs, Program("unpack", FORMATS["Q6_K"], dtype, torch.float16, 1)]:
        assert compiler.compile(program.source(), capability).startswith(ELF)


def test_a_gpu_newer_than_nvrtc_gets_ptx_of_the_newest_it_knows(compiler):
    image = compiler.compile(Program("unpack", FORMATS["Q8_0"], torch.float16).source(), 999)
    assert f".target sm_{max(compiler.architectures)}".encode() in image


def test_what_nvrtc_refuses_is_said(compiler):
    with pytest.raises(CudaError, match="no code for compute capability 1.0"):
        compiler.compile("", 10)
    with pytest.raises(CudaError, match='(?s)featherweight.cu.1.*"nonsense" is undefined'):
        compiler.compile("int x = nonsense;", 80)


def test_blocks_that_are_no_whole_chunks_are_refused():
    with pytest.raises(CudaError, match="blocks of 12 values"):
        Program("unpack", FORMATS["NF4"].of_block_length(12), torch.float32).source()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_the_backend_says_so():
    with pytest.raises(CudaError, match="this torch is not built for CUDA"):
        nvrtc_backend.BACKEND.probe(torch.device("cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_driver_is_said():
    with pytest.raises(OSError, match="no_such_driver"):
        Driver("no_such_driver.so")


@pytest.fixture
def as_device(on_cpu, monkeypatch, caplog):
    """The kernel layer, where nvrtc is the backend of the CPU."""
    backend = kernel_layer.Backend("nvrtc", partial(probe, on_cpu.unpack), nvrtc_backend.kernel_table(lambda: on_cpu))
    monkeypatch.setattr(nvrtc_backend, "BACKEND", backend)
    monkeypatch.setattr(kernel_layer, "PRIORITY", {"cpu": ("nvrtc",)})
    monkeypatch.setattr(kernel_layer, "_selectors", {})
    wait_for_kernels(monkeypatch)
    monkeypatch.setenv(kernel_layer.VARIABLE, "nvrtc")
    caplog.set_level(logging.DEBUG)


@pytest.mark.usefixtures("as_device")
def test_a_device_uses_the_backend_after_its_probe(caplog):
    tensors = random_tensors(FORMATS["Q5_1"], 8, torch.device("cpu"))
    out = torch.empty(8 * 32)
    assert kernel_layer.find("unpack", out.device, FORMATS["Q5_1"], out.dtype) is not None
    assert_same_bits(kernel_layer.unpack_into(FORMATS["Q5_1"], tensors, out), reference(FORMATS["Q5_1"], tensors))
    assert "Packed weights on cpu use nvrtc" in caplog.text


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_a_layer_with_bias_and_low_rank_branch_gives_the_values_of_the_dense_one(fmt, tokens):
    assert_layer_equals_the_dense_one(fmt, (2, tokens))


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("right, wrong, reason", [
    ("- 8", "- 7", "values differ from the reference"), ("- 8", "- eight", "eight")], ids=["wrong values", "no C++"])
def test_a_wrong_source_is_off_with_the_reason_and_the_reference_is_used(monkeypatch, caplog, right, wrong, reason):
    source = Program.source
    monkeypatch.setattr(Program, "source", lambda program: source(program).replace(right, wrong))
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32, dtype=torch.float16)
    tensors = random_tensors(fmt, 8, torch.device("cpu"))
    assert kernel_layer.find("unpack", out.device, fmt, out.dtype, torch.bfloat16) is None
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out, torch.bfloat16),
                     fmt.unpack_into(tensors, torch.empty_like(out), torch.bfloat16))
    assert "unpack of Q4_0 to float16 by way of bfloat16 by nvrtc" in caplog.text and reason in caplog.text


def test_every_source_is_used():
    basic = ("unpack", "linear")
    kernels = {"cuda": basic, "metal": basic, "cpu": (*basic, "int8_rows", "int8_tokens", "pack_blocks", "pack_columns")}
    used = {path for platform in kernels for fmt in ALL_FORMATS for kernel in kernels[platform]
            for path in source_files(platform, fmt, kernel)}
    assert used == {path for path in SOURCES.rglob("*") if path.is_file()}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_rule_leaves_a_source_out_of_the_package():
    sources = sorted(str(path) for path in SOURCES.rglob("*") if path.is_file())
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *sources], cwd=SOURCES, capture_output=True, text=True)
    assert not ignored.stdout


@pytest.mark.usefixtures("as_device")
@pytest.mark.heavy
@pytest.mark.parametrize("tokens", [4, 16])
def test_a_weak_lora_arrives(tokens):
    assert_a_weak_lora_arrives(tokens)
