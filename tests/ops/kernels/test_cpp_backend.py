"""What only the CPU backend has: kernels that pack, and its compiler. The rest is in
test_backends.py."""
import contextlib
import errno
import logging
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from kernel_backends import CPUS, backend_on_cpu, change_source
from kernel_cases import (
    ALL_FORMATS,
    ENCODED_ROWS,
    GRID_SAMPLE,
    assert_same_bits,
    decide_on_demand,
    reference,
    shared_cache,
)
from pack_api import (
    FORMATS,
    check,
    cpp_backend,
    pack_tensor,
    packed_tensor,
    product,
    random_tensors,
)

from featherweight.ops import kernels as kernel_layer
from featherweight.ops.kernels import quantize_validation
from featherweight.ops.kernels.cpp_backend import CppCompiler, CpuKernels
from featherweight.ops.kernels.kernel import Case, CompilerError, SourceError
from featherweight.ops.kernels.validation import WrongResult

CPU = torch.device("cpu")
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32",
                                reason="needs a C++ compiler")


@pytest.fixture(scope="module", params=CPUS)
def on_cpu(request, tmp_path_factory):
    """The kernels for this CPU, and for it without some of its instructions."""
    with backend_on_cpu(request.param, shared_cache(tmp_path_factory)) as backend:
        yield backend


@pytest.fixture
def freshly_compiled(tmp_path, monkeypatch):
    """The kernels for this CPU, none compiled yet; each compiles in a third of the usual time."""
    monkeypatch.setattr(cpp_backend, "FLAGS",
                        tuple(flag.replace("-O3", "-O1") for flag in cpp_backend.FLAGS))
    with backend_on_cpu("cpp", tmp_path) as backend:
        yield backend


@pytest.fixture
def few_blocks(one_thread, monkeypatch):
    """Less work for slow kernels, and for each of three threads."""
    monkeypatch.setattr(quantize_validation, "SEVERAL_THREADS", 1 << 14)
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)


def kernel_of(backend, capability):
    return next(kernel for kernel in backend.kernels if kernel.capability == capability)


@pytest.mark.parametrize("on_cpu", ["cpp"], indirect=True)
@pytest.mark.parametrize(
    ("op", "fmt", "dtype"),
    [("int8_tokens", None, torch.float32), ("int8_rows", FORMATS["Q8_0"], torch.int8)],
)
def test_codes_are_right_where_torch_rounds_what_it_multiplies(on_cpu, op, fmt, dtype, monkeypatch):
    """As on a GPU that is set to TF32, which has float16's ten bits of mantissa."""
    multiply = torch.mm

    def rounding(values, other):
        return multiply(values.half().to(values.dtype) if values.dtype == torch.float32 else values,
                        other)

    monkeypatch.setattr(torch, "mm", rounding)
    check(kernel_of(on_cpu, op), fmt, dtype, CPU)


def test_a_compiler_for_another_machine_is_asked_for_nothing_of_x86(tmp_path, monkeypatch):
    command = tmp_path / "compiler"
    command.write_text(
        '#!/bin/sh\ncase "$*" in *prefer-vector-width*) echo what? >&2; exit 1;; esac\n'
        f'exec {COMMAND} "$@"\n')
    command.chmod(0o755)
    fmt = FORMATS["Q8_0"]
    tensors = random_tensors(fmt, 2, CPU)
    for machine, works in (("aarch64", True), ("x86_64", False)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        on_cpu = CpuKernels(CppCompiler((str(command),), tmp_path / machine))
        with contextlib.nullcontext() if works else pytest.raises(CompilerError, match="what"):
            on_cpu.dequantize(fmt, tensors, torch.empty(64), 0)


# torch searches a minute for those of a codebook; test_packing_magnitudes.py packs them by kernels
GRIDS = [
    pytest.param(fmt, id=fmt.name, marks=() if fmt.name in GRID_SAMPLE and fmt.name not in (
        "IQ4_XS", "NF4") else pytest.mark.heavy)
    for fmt in ALL_FORMATS if fmt.grid and fmt.block_length < 4096
]


@pytest.mark.parametrize("on_cpu", ["cpp"], indirect=True)
@pytest.mark.parametrize("taps", [1, 9, cpp_backend.MAX_TAPS, cpp_backend.MAX_TAPS + 1, 343])
def test_weights_of_convolutions_are_transposed_whatever_their_taps(on_cpu, taps):
    """More than a core's cache is for would be written past the end of what the kernel has."""
    values = torch.randn(5, 37, taps)
    out = torch.empty(5, taps, 37, dtype=torch.bfloat16)
    kernel_of(on_cpu, "channels_last").run(values, out)
    assert torch.equal(out, values.transpose(1, 2).bfloat16())


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("on_cpu", ["cpp"], indirect=True)
@pytest.mark.parametrize("fmt", GRIDS)
def test_packed_blocks_are_as_good_as_the_references(on_cpu, fmt):
    check(kernel_of(on_cpu, "pack_blocks"), fmt, torch.float32, CPU)


# tests/ops/packing/test_packing_feedback.py compiles these kernels for all instructions.
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("capability", ["pack_blocks", "pack_columns"])
@pytest.mark.parametrize(
    ("on_cpu", "name"),
    [
        ("cpp with AVX2", "NF4"),
        ("cpp without AVX", "Q4_K"),
        pytest.param("cpp with AVX2", "Q4_K", marks=pytest.mark.heavy),
        # the last compiles for ten seconds
        pytest.param("cpp without AVX", "NF4", marks=pytest.mark.heavy),
    ],
    indirect=["on_cpu"],
)
def test_packing_takes_fewer_instructions_too(on_cpu, capability, name):
    check(kernel_of(on_cpu, capability), FORMATS[name], torch.float32, CPU)


PACKING_ROWS = ("pack_rows", "pack_row_columns")


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("on_cpu", ["cpp"], indirect=True)
@pytest.mark.parametrize("capability", PACKING_ROWS)
@pytest.mark.parametrize("dtype", [
    torch.float32, *(pytest.param(dtype, marks=pytest.mark.heavy)
                     for dtype in (torch.bfloat16, torch.float16))], ids=str)
@pytest.mark.parametrize("fmt", ENCODED_ROWS.values(), ids=ENCODED_ROWS)
def test_rows_are_encoded_as_the_reference_does(on_cpu, capability, fmt, dtype):
    kernel = kernel_of(on_cpu, capability)
    assert kernel.accepts(fmt, dtype)
    check(kernel, fmt, dtype, CPU)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("on_cpu", ["cpp with AVX2", "cpp without AVX"], indirect=True)
@pytest.mark.parametrize("capability", PACKING_ROWS)
@pytest.mark.parametrize("key", ["INT8_CONVROT", "F8_E4M3", "NVFP4_ROWS", "W4A8"])
def test_rows_are_encoded_with_fewer_instructions_too(on_cpu, capability, key):
    check(kernel_of(on_cpu, capability), ENCODED_ROWS[key], torch.bfloat16, CPU)


def heavy(*faults):
    return [pytest.param(*fault, marks=pytest.mark.heavy) for fault in faults]


@pytest.mark.parametrize(("capability", "key", "correct", "wrong", "message"), [
    ("pack_blocks", "Q3_K", "step <= 1", "step < -1", "mean error"),
    ("pack_columns", "Q3_K", "add_shares(values, values, shares, columns, first, stop, stop);", "",
     "residuals do not match the codes"),
    ("pack_columns", "Q3_K", "values[first + i][vector]", "values[i][vector]", "mean error"),
    ("pack_columns", "Q3_K", "* sizeof(float));\n        else",
     "* sizeof(float) + 4);\n        else", "outside its columns|do not match the codes"),
    ("pack_rows", "INT8_CONVROT", "tile[i] *= ROTATION_FACTOR;", "", "scale|codes|worse"),
    ("pack_rows", "W4A8", "unit = either(better, tried, unit);", "", "worse"),
    ("pack_rows", "NVFP4_ROWS", "ORDER == HIGH_FIRST ? i ^ 1 : i", "i", "codes"),
    ("pack_rows", "MXFP8", "memcpy(scales, bytes, count);", "memcpy(scales, bytes, LANES);",
     "outside its rows"),
    ("pack_row_columns", "NVFP4_ROWS",
     "choose_in_order<false>(values, steps, columns, rounders);", "", "mean error"),
    ("pack_row_columns", "INT8_CONVROT", "r < count; r++)\n                memcpy(to",
     "r <= count; r++)\n                memcpy(to", "outside its rows"),
    *heavy(
        ("pack_blocks", "Q3_K", "nearest_integer(between(scaled", "(between(scaled", "mean error"),
        ("pack_blocks", "Q3_K", "best.d[lane];", "best.d[0];", "mean error"),
        ("pack_columns", "Q3_K", "share, values[column][v], values[later][v]",
         "share, values[column][0], values[later][v]", "residuals do not match the codes"),
        ("pack_columns", "Q3_K", "scale[v] = scales[v].scale[g]", "scale[v] = scales[v].scale[0]",
         "mean error"),
        ("pack_columns", "Q3_K", "before = rounders.of[v].value(level[v]), target += before",
         "before = rounders.of[v].value(level[v])", "mean error"),
        ("pack_rows", "W4A8", "if (HAS_ROW_NUMBERS) group[i] *= inverted;", "", "codes|worse"),
        ("pack_rows", "F8_E4M3", "memcpy(codes + start, some, count);", ";", "codes"),
        ("pack_rows", "INT8_ROWS", "unit = tried, least = error;", "unit = tried;", "worse"),
        ("pack_row_columns", "F8_E4M3",
         "add_shares(values, values, shares, columns, first, stop, stop);", "", "mean error"),
        ("pack_row_columns", "MXFP8", "row * rows.scale_stride, rows", "0, rows", "mean error"),
        ("pack_row_columns", "W4A8", "HAS_ROW_NUMBERS ? 1 / rows.row_scales[r] : 1", "1",
         "mean error")),
])
@pytest.mark.usefixtures("few_blocks")
def test_a_wrong_kernel_that_packs_is_found_out(
        freshly_compiled, capability, key, correct, wrong, message, monkeypatch):
    change_source(monkeypatch, correct, wrong)
    fmt = ENCODED_ROWS[key] if key in ENCODED_ROWS else FORMATS[key]
    with pytest.raises(WrongResult, match=message):
        check(kernel_of(freshly_compiled, capability), fmt, torch.float32, CPU)


@pytest.mark.usefixtures("fresh", "compiled_before")
def test_packing_uses_the_kernel(monkeypatch):
    runs, run = [], cpp_backend._kernels().pack_blocks

    def recorded(*arguments):
        runs.append(1)
        run(*arguments)

    monkeypatch.setattr(cpp_backend._kernels(), "pack_blocks", recorded)
    pack_tensor(torch.ones(37, 512), FORMATS["Q4_K"])
    assert runs


def dequantize_a_block(kernels):
    kernels.dequantize(FORMATS["Q4_0"], random_tensors(FORMATS["Q4_0"], 1, CPU), torch.empty(32),
                       0)


def test_a_kernel_is_compiled_once_for_a_compiler_and_a_cpu(tmp_path, monkeypatch):
    command, calls = tmp_path / "compiler", tmp_path / "calls"
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {COMMAND} "$@"\n')
    command.chmod(0o755)

    def compilations():
        dequantize_a_block(CpuKernels(CppCompiler((str(command),), tmp_path / "kernels")))
        return sum("kernel.cpp" in line for line in calls.read_text().splitlines())

    assert [compilations(), compilations()] == [1, 1]
    monkeypatch.setattr(cpp_backend, "_cpu", lambda: "another CPU")
    assert compilations() == 2


def test_the_oldest_of_too_many_libraries_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_backend, "MAX_LIBRARIES", 2)
    compiler = CppCompiler((COMMAND,), tmp_path / "kernels")
    for number in range(4):
        library = compiler.library(f'extern "C" int number() {{ return {number}; }}')
        assert library.number() == number
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 3  # two, and the one that is new


def test_a_library_that_windows_does_not_remove_stays(tmp_path, monkeypatch):
    def in_use(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "in use", str(path))

    monkeypatch.setattr(cpp_backend, "MAX_LIBRARIES", 0)
    monkeypatch.setattr(cpp_backend.Path, "unlink", in_use)
    compiler = CppCompiler((COMMAND,), tmp_path / "kernels")
    for number in range(2):
        library = compiler.library(f'extern "C" int number() {{ return {number}; }}')
        assert library.number() == number
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2


def test_the_compilers_error_is_in_the_message(tmp_path):
    with pytest.raises(SourceError, match="nonsense"):
        CppCompiler((COMMAND,), tmp_path).library("int x = nonsense;")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fresh(monkeypatch, tmp_path, caplog):
    """The kernel layer as when ComfyUI starts, with nothing compiled yet."""
    decide_on_demand(monkeypatch)
    monkeypatch.delenv(kernel_layer.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpp_backend._kernels.cache_clear()
    yield
    cpp_backend._kernels.cache_clear()


@pytest.fixture
def compiled_before(monkeypatch, tmp_path_factory):
    """Uses kernels that other tests may have compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache(tmp_path_factory)))


@pytest.mark.usefixtures("fresh")
def test_a_cpu_uses_them_unasked_and_keeps_them_in_the_users_cache(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    fmt, out = FORMATS["Q5_1"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    assert kernel_layer.find("dequantize", CPU, fmt, out.dtype) is not None
    assert_same_bits(kernel_layer.dequantize_into(fmt, tensors, out), reference(fmt, tensors))
    assert "Packed weights on cpu use cpp" in caplog.text
    assert list((tmp_path / "cache/featherweight/kernels").glob("*.so"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("obstacle", "reason"), [
    ("no compiler", "there is no C++ compiler; the package ziglang is one, with which"),
    ("a compiler that fails", "false:"),
    ("no place to write",
     "no folder can be written and run from; XDG_CACHE_HOME names another one")])
def test_torch_does_the_work_where_nothing_can_be_compiled_and_one_line_says_why(
        obstacle, reason, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    if obstacle == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setitem(sys.modules, "ziglang", None)  # as where it is not installed
    elif obstacle == "a compiler that fails":
        monkeypatch.setenv("CXX", shutil.which("false"))
    else:
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(cpp_backend.tempfile, "TemporaryDirectory", full)
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    assert_same_bits(kernel_layer.dequantize_into(fmt, tensors, out), reference(fmt, tensors))
    (line,) = caplog.records
    assert line.levelno == logging.INFO and "\n" not in line.message
    assert line.message.startswith(
        "[Featherweight] Packed weights on cpu use torch, because no kernel works there (cpp: ")
    assert reason in line.message
    assert (f'"{sys.executable}" -m pip install ziglang, then a restart' in line.message) == (
        obstacle == "no compiler")
    assert reason in kernel_layer.used(CPU, [fmt], out.dtype)
    assert reason in kernel_layer._deciders[CPU].reason


# what happens to the machine's compiler -> (how it is started then, what it says)
FAULTS = {
    "killed": ("-wrapper sh,-c,'kill -9 $$'", "fatal error: Killed signal"),
    "file size limit": ("ulimit -f 8", "File size limit exceeded"),
    "full drive": ("mount", "No space left on device"),
    "no memory": ("ulimit -v 40000", ""),
}


@pytest.mark.skipif(sys.platform != "linux" or "clang" in COMMAND, reason="needs GCC on Linux")
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_compiler_without_means_is_no_verdict_and_the_kernel_is_used_once_it_has_them(
        fault, monkeypatch, tmp_path):
    how, words = FAULTS[fault]
    compiler, on = tmp_path / "compiler", tmp_path / "on"
    start = f'{COMMAND} {how} "$@"' if fault == "killed" else f'{how}; exec {COMMAND} "$@"'
    if fault == "full drive":  # a small one is put over the folder that the compiler works in
        start = (f'cp "$SOURCE" {tmp_path}/source; mount -t tmpfs -o size=24k none "$TMPDIR"'
                 f' && cp {tmp_path}/source "$SOURCE" && exec {COMMAND} "$@"')
        start = f"export SOURCE=\"$TMPDIR/kernel.cpp\"; exec unshare -rm sh -c '{start}' sh \"$@\""
        if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
            pytest.skip("this user may mount nothing")
    compiler.write_text(f'#!/bin/sh\nif [ -e {on} ]; then\n{start}\nelse exec {COMMAND} "$@"; fi\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpp_backend, "FLAGS",
                        tuple(flag.replace("-O3", "-O1") for flag in cpp_backend.FLAGS))
    first, later = ([("dequantize", FORMATS[name], torch.float32)] for name in ("Q4_0", "Q4_1"))
    kernel_layer.decide(CPU, first)
    on.touch()
    kernel_layer.decide(CPU, later)
    decider = kernel_layer._deciders[CPU]
    decision = decider.find(Case.of(*later[0]))
    assert decision.verdict == "open" and words in decision.why
    assert "refused" not in decider._verdicts.path.read_text()
    on.unlink()
    kernel_layer.decide(CPU, later)  # the next load
    assert decider.find(Case.of(*later[0])).verdict == "right"


@pytest.mark.skipif(sys.platform != "linux" or "clang" in COMMAND, reason="needs GCC on Linux")
def test_a_compiler_that_is_killed_at_first_leaves_no_kernel_without_threads(tmp_path):
    compiler = CppCompiler((COMMAND,), tmp_path)
    flags = compiler._flags
    compiler._flags += "-wrapper", "sh,-c,kill -9 $$"
    with pytest.raises(CompilerError, match="Killed"):
        compiler.library(cpp_backend.OPENMP_SOURCE)
    compiler._flags = flags
    compiler.library(cpp_backend.OPENMP_SOURCE)
    assert compiler._openmp == (cpp_backend.OPENMP,)


@pytest.mark.usefixtures("fresh", "compiled_before")
@pytest.mark.parametrize("setting", ["torch", "cpp"])
@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_a_weight_whose_bytes_lie_in_pieces_gives_the_values_of_one_in_one_piece(
        name, setting, monkeypatch):
    monkeypatch.setenv(kernel_layer.VARIABLE, setting)
    fmt, (rows, columns) = FORMATS[name], (16, 512)
    whole = random_tensors(fmt, rows * columns // fmt.block_length, CPU, bounded=True)
    whole[0] = whole[0].view(rows, -1)
    apart = [torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0] for tensor in whole]
    assert not any(tensor.is_contiguous() for tensor in apart)

    def values(tensors):
        weight = packed_tensor(fmt, tensors[0], (rows, columns),
                               scale=tensors[1] if fmt.qparams else None)
        yield torch.cat([part.clone() for _, part in
                         product.dequantized_slices(weight, torch.float32)])
        yield product.dequantize(weight, torch.float32)
        yield product.embedding(torch.tensor([3, 0, 15]), weight, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for tokens in (3, 40):
            input = torch.randn((tokens, columns), generator=generator)
            yield product.linear(input, weight)
            yield product.linear(input, weight, fast=True)

    for result, expected in zip(values(apart), values(whole), strict=True):
        assert torch.equal(result, expected)
