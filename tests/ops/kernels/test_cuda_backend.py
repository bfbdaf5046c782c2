"""The CUDA sources compile for every GPU without one. What they compute is in
test_backends.py."""
import shutil
import subprocess
import types
from importlib.util import find_spec

import pytest
import torch
from kernel_cases import (
    ALL_FORMATS,
    BLOCK_FORMATS,
    DTYPES,
    ONE_OF_EACH_BLOCK,
    USUAL_ROWS,
)
from pack_api import (
    FORMATS,
    product,  # noqa: F401
)

from featherweight.ops.kernels import cuda_backend, runtime_compiler
from featherweight.ops.kernels.cuda_backend import LINEAR_ROWS, Program, alignment
from featherweight.ops.kernels.kernel import SourceError
from featherweight.ops.kernels.kernel_source import SOURCES, source_files
from featherweight.ops.kernels.runtime_compiler import (
    CUDA,
    HIP,
    Architecture,
    Compiler,
    Driver,
    GpuError,
    compiler_libraries,
    driver_libraries,
)

CAPABILITIES = (61, 75, 80, 86, 89, 90, 100, 120)
UNROTATED_ROWS = [fmt for fmt in USUAL_ROWS if not fmt.layout.rotation][::3]
ELF = b"\x7fELF"


@pytest.fixture(scope="module")
def compiler():
    libraries = compiler_libraries(CUDA)
    if not libraries:
        pytest.skip("no NVRTC here: pip install nvidia-cuda-nvrtc-cu12")
    return Compiler(libraries[0])


@pytest.mark.skipif(find_spec("nvidia") is None or find_spec("nvidia.cuda_nvrtc") is None,
                    reason="no nvidia-cuda-nvrtc-cu12")
def test_nvrtc_is_found_in_its_package():
    assert any("cuda_nvrtc" in library for library in compiler_libraries(CUDA))


def lay_out(monkeypatch, folder, files, package, on_windows):
    """Makes a folder the place of torch and of a vendor's package, with these empty files."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    monkeypatch.setattr(runtime_compiler, "ON_WINDOWS", on_windows)
    monkeypatch.setattr(torch, "__file__", str(folder / "torch" / "__init__.py"))
    packages = types.SimpleNamespace(submodule_search_locations=[str(folder / package)])
    monkeypatch.setattr(runtime_compiler.importlib.util, "find_spec", lambda name: packages)


@pytest.mark.parametrize(("on_windows", "files", "order"), [
    (True, ["torch/lib/nvrtc64_120_0.dll", "torch/lib/nvrtc64_120_0.alt.dll",
            "torch/lib/nvrtc-builtins64_128.dll"], [0]),
    (True, ["torch/c10.dll", "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll",
            "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll"], [2, 1]),
    (False, ["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
             "nvidia/cu13/lib/libnvrtc.alt.so.13",
             "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9"], [1, 0]),
], ids=["Windows, in torch", "Windows, in packages", "Linux, in packages"])
def test_nvrtc_of_torchs_version_comes_first(on_windows, files, order, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    lay_out(monkeypatch, tmp_path, files, "nvidia", on_windows)
    system = [] if on_windows else ["libnvrtc.so.12"]
    assert compiler_libraries(CUDA) == [*(str(tmp_path / files[index]) for index in order), *system]


@pytest.mark.parametrize(("on_windows", "files", "compiler", "driver"), [
    (False, ["torch/lib/libhiprtc.so", "torch/lib/libhiprtc-builtins.so",
             "torch/lib/libamdhip64.so"], [0, "libhiprtc.so.6"], [2, "libamdhip64.so.6"]),
    (False, ["_rocm_sdk_core/lib/libhiprtc.so.7", "_rocm_sdk_core/lib/libamdhip64.so.7",
             "_rocm_sdk_core/lib/libhiprtc-builtins.so.7"],
     [0, "libhiprtc.so.6"], [1, "libamdhip64.so.6"]),
    (True, ["_rocm_sdk_core/bin/hiprtc0701.dll", "_rocm_sdk_core/bin/hiprtc-builtins0701.dll",
            "_rocm_sdk_core/bin/amdhip64_7.dll"], [0], [2, "amdhip64_6.dll"]),
], ids=["Linux, in torch", "Linux, in packages", "Windows, in packages"])
def test_the_libraries_of_rocm_are_found(on_windows, files, compiler, driver, tmp_path,
                                         monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    lay_out(monkeypatch, tmp_path, files, "_rocm_sdk_core", on_windows)

    def expected(places):
        return [place if isinstance(place, str) else str(tmp_path / files[place])
                for place in places]

    assert compiler_libraries(HIP) == expected(compiler)
    assert driver_libraries(HIP) == expected(driver)


def each_capability(name, values, some):
    """Each of `some` for the first GPU, and one of them in turn for each other; the rest is
    heavy."""
    cases = [
        pytest.param(value, capability, id=f"{getattr(value, '__name__', value)}-{capability}",
                     marks=() if value == some[turn % len(some)] or (not turn and value in some)
                     else pytest.mark.heavy)
        for turn, capability in enumerate(CAPABILITIES) for value in values
    ]
    return pytest.mark.parametrize(f"{name}, capability", cases)


@pytest.fixture
def compile(compiler, capability):
    """compile(program): for the GPU of the case."""
    if capability not in compiler.capabilities:
        pytest.skip(f"NVRTC {compiler.version} does not know compute capability {capability / 10}")
    architecture = Architecture(f"sm_{capability}")
    return lambda program: compiler.compile(program.source(architecture), architecture.name)


@each_capability("fmt", BLOCK_FORMATS, ONE_OF_EACH_BLOCK)
def test_every_source_compiles_for_every_gpu(compile, fmt):
    for kernel in ("dequantize", "linear", "int8_rows"):
        assert compile(Program(kernel, fmt, torch.bfloat16, alignment(fmt))).startswith(ELF)


@each_capability("fmt", USUAL_ROWS, USUAL_ROWS[::4])
def test_rows_compile_for_every_gpu(compile, fmt):
    program = Program("dequantize_rows", fmt, torch.bfloat16, alignment(fmt))
    assert compile(program).startswith(ELF)


@each_capability("fmt", UNROTATED_ROWS, UNROTATED_ROWS[::3])
def test_products_with_rows_compile_for_every_gpu(compile, fmt):
    for kernel in ("linear", "int8_rows"):
        program = Program(kernel, fmt, torch.bfloat16, alignment(fmt))
        assert compile(program).startswith(ELF)


@each_capability("dtype", DTYPES, DTYPES)
def test_every_type_and_number_of_rows_compiles_for_every_gpu(compile, dtype):
    for tokens, rows in LINEAR_ROWS.items():
        assert compile(Program("linear", FORMATS["Q6_K"], dtype, 2, tokens, rows)).startswith(ELF)
    assert compile(Program("dequantize", FORMATS["Q6_K"], dtype, 1)).startswith(ELF)
    if dtype != torch.float32:
        assert compile(Program("add_rounded", None, dtype)).startswith(ELF)


def test_a_gpu_newer_than_nvrtc_gets_ptx_of_the_newest_it_knows(compiler):
    source = Program("dequantize", FORMATS["Q8_0"], torch.float16).source(Architecture("sm_999"))
    image = compiler.compile(source, "sm_999")
    assert f".target sm_{max(compiler.capabilities)}".encode() in image


def test_nvrtcs_error_is_in_the_message(compiler):
    with pytest.raises(GpuError, match="no code for compute capability 1.0"):
        compiler.compile("", "sm_10")
    with pytest.raises(SourceError, match='(?s)featherweight.cu.1.*"nonsense" is undefined'):
        compiler.compile("int x = nonsense;", "sm_80")


def test_blocks_that_do_not_divide_into_chunks_are_refused():
    with pytest.raises(GpuError, match="blocks of 12 values"):
        Program("dequantize", FORMATS["NF4"].of_block_length(12), torch.float32).source(
            Architecture("sm_80"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_the_backend_says_so():
    with pytest.raises(GpuError, match="this torch is built neither for CUDA nor for ROCm"):
        cuda_backend.BACKEND.probe(torch.device("cuda:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_driver_is_named():
    with pytest.raises(OSError, match="no_such_driver"):
        Driver("no_such_driver.so")


def test_every_source_is_used():
    basic = ("dequantize", "dequantize_rows", "linear")
    kernels = {
        "cuda": (*basic, "int8_rows", "add_rounded"), "metal": basic,
        "cpu": (*basic, "linear_bfloat16", "channels_last", "attention", "add_rounded",
                "int8_rows", "int8_tokens", "pack_blocks", "pack_columns", "pack_rows",
                "pack_row_columns")
    }
    used = {path for platform in kernels for fmt in (*ALL_FORMATS, FORMATS["F16"], USUAL_ROWS[0])
            for kernel in kernels[platform]
            for path in source_files(platform, fmt, kernel)}
    assert used == {path for path in SOURCES.rglob("*") if path.is_file()}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_rule_leaves_a_source_out_of_the_package():
    sources = sorted(str(path) for path in SOURCES.rglob("*") if path.is_file())
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *sources], cwd=SOURCES,
                             capture_output=True, text=True)
    assert not ignored.stdout
