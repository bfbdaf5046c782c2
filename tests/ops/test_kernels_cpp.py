"""The kernels for CPUs, compiled as a user's machine compiles them, and for CPUs with fewer instructions."""
import contextlib
import errno
import logging
import os
import platform
import shutil
import sys
from functools import partial

import pytest
import torch
from featherweight.ops import kernels as kernel_layer
from featherweight.ops import int8, packing, product
from featherweight.ops.format import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels import cpp_backend
from featherweight.ops.kernels.check import WrongResult, check, random_tensors
from featherweight.ops.kernels.cpp_backend import MOST_TOKENS, CppCompiler, CppError, CpuKernels
from featherweight.ops.tensor import packed_tensor
from kernel_cases import (
    ALL_FORMATS, assert_a_weak_lora_arrives, assert_layer_equals_the_dense_one, assert_odd_weight_is_right,
    assert_product_rounds_once, assert_same_bits, each_dtype, each_format, each_format_with, reference, wait_for_kernels,
)

CPU = torch.device("cpu")
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Instructions to do without -> how many values are handled at once.
FEWER = {"all": ((), (16, 8)), "AVX2": (("-mno-avx512f",), (8,)), "no AVX": (("-mno-avx",), (8,))}

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32", reason="needs a C++ compiler")


def test_a_compiler_is_found_here():
    assert cpp_backend._kernels()._compiler.command


@pytest.fixture(scope="module", params=FEWER)
def on_cpu(request, tmp_path_factory):
    """The kernels for this CPU, and for it without some of its instructions."""
    options, lanes = FEWER[request.param]
    if options and not ON_X86:
        pytest.skip("instructions of x86")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_backend, "FLAGS", (*cpp_backend.FLAGS, *options))
        patch.setattr(torch.cpu, "_is_avx512_supported", partial(lambda: 16 in lanes))
        yield CpuKernels(CppCompiler(COMMAND, tmp_path_factory.mktemp("kernels")))


def kernels_of(on_cpu, op):
    return [kernel for kernel in cpp_backend.kernel_table(lambda: on_cpu) if kernel.capability == op]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_format
def test_unpack_equals_the_reference_rounded_once(on_cpu, fmt, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 600, CPU)
    expected = reference(fmt, tensors)
    out = torch.empty(len(expected))
    on_cpu.unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_are_rounded_once(on_cpu, dtype):
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65520.0, 65519.99, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 2.0 ** -25, 3.39e38]
    values = torch.cat([torch.randn(991) * 2.0 ** torch.randint(-24, 16, (991,)), torch.tensor(edges)])
    fmt = INT8.of_columns(8)
    codes = torch.ones(len(values), 8, dtype=torch.uint8)
    out = torch.empty(len(values), 8, dtype=dtype)
    on_cpu.unpack(fmt, [codes.flatten(), values], out, None, 0)
    assert_same_bits(out, values.to(dtype).unsqueeze(-1).expand(-1, 8))


@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NVFP4"], FORMATS["NF4"], INT8.of_columns(40)],
                         ids=lambda fmt: fmt.__name__)
@pytest.mark.parametrize("left", [8, 16, 24])
def test_unpack_starts_at_any_block_and_ends_within_one(on_cpu, fmt, left):
    tensors = random_tensors(fmt, 6, CPU, calm=not fmt.scales_apart)
    out = torch.empty(3 * fmt.block_length - left + 2, dtype=torch.bfloat16)
    on_cpu.unpack(fmt, tensors, out[1:-1], None, 2)
    assert_same_bits(out[1:-1], fmt.unpack_into(tensors, torch.empty_like(out[1:-1]), first=2))


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unpack_rounds_to_the_value_dtype_first(on_cpu, value_dtype):
    fmt = FORMATS["Q6_K"]
    tensors = random_tensors(fmt, 40, CPU)
    out = torch.empty(40 * fmt.block_length)
    on_cpu.unpack(fmt, tensors, out, value_dtype, 0)
    assert_same_bits(out, fmt.unpack_into(tensors, torch.empty_like(out), value_dtype))


@pytest.mark.parametrize("shape", [(7, 72), (5, 45), (0, 64)], ids=str)
def test_unpack_of_odd_weights_and_of_none(on_cpu, shape):
    assert_odd_weight_is_right(on_cpu.unpack, shape)


@pytest.mark.parametrize("on_cpu", ["all"], indirect=True)
@each_format
def test_product_is_right(on_cpu, fmt):
    check(kernels_of(on_cpu, "linear")[0], fmt, torch.bfloat16, None, CPU)


@pytest.mark.parametrize("on_cpu", ["all"], indirect=True)
@pytest.mark.parametrize("op, fmt, dtype", [("int8_tokens", None, torch.float32), ("int8_rows", FORMATS["Q8_0"], torch.int8)])
def test_codes_are_right_where_torch_rounds_what_it_multiplies(on_cpu, op, fmt, dtype, monkeypatch):
    """As a GPU does that is set to TF32, which has the ten bits of float16."""
    multiply = torch.mm

    def rounding(values, other):
        return multiply(values.half().to(values.dtype) if values.dtype == torch.float32 else values, other)

    monkeypatch.setattr(torch, "mm", rounding)
    check(kernels_of(on_cpu, op)[0], fmt, dtype, None, CPU)


def test_a_compiler_for_another_machine_is_asked_for_nothing_of_x86(tmp_path, monkeypatch):
    command = tmp_path / "compiler"
    command.write_text(f'#!/bin/sh\ncase "$*" in *prefer-vector-width*) echo what? >&2; exit 1;; esac\nexec {COMMAND} "$@"\n')
    command.chmod(0o755)
    fmt = FORMATS["Q8_0"]
    tensors = random_tensors(fmt, 2, CPU)
    for machine, works in (("aarch64", True), ("x86_64", False)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        on_cpu = CpuKernels(CppCompiler(str(command), tmp_path / machine))
        with contextlib.nullcontext() if works else pytest.raises(CppError, match="what"):
            on_cpu.unpack(fmt, tensors, torch.empty(64), None, 0)


@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_product_sums_in_float32_and_rounds_once(on_cpu, tokens, threads, dtype, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    assert_product_rounds_once(kernels_of(on_cpu, "linear"), tokens, dtype)


@each_format_with("on_cpu", FEWER, indirect=True)
def test_codes_of_a_weights_rows_are_right(on_cpu, fmt):
    check(kernels_of(on_cpu, "int8_rows")[0], fmt, torch.int8, None, CPU)


@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_of_the_inputs_rows_are_right(on_cpu, threads, dtype, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(kernels_of(on_cpu, "int8_tokens")[0], None, dtype, None, CPU)


def test_codes_are_those_of_values_rounded_to_the_value_dtype(on_cpu, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)
    check(kernels_of(on_cpu, "int8_rows")[0], FORMATS["Q6_K"], torch.int8, torch.bfloat16, CPU)


# Each kind of grid has its own branches of the search; others of a kind compile as long again.
KINDS_OF_GRIDS = {"Q4_K", "Q3_K", "Q4_0", "Q4_1", "IQ4_XS", "NF4"}
GRIDS = [pytest.param(fmt, id=fmt.__name__, marks=() if fmt.__name__ in KINDS_OF_GRIDS else pytest.mark.heavy)
         for fmt in ALL_FORMATS if fmt.grid and fmt.block_length < 4096]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("on_cpu", ["all"], indirect=True)
@pytest.mark.parametrize("fmt", GRIDS)
def test_packed_blocks_are_as_good_as_the_references(on_cpu, fmt, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)
    check(kernels_of(on_cpu, "pack_blocks")[0], fmt, torch.float32, None, CPU)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_packing_takes_fewer_instructions_too(on_cpu, fmt):
    check(kernels_of(on_cpu, "pack_blocks")[0], fmt, torch.float32, None, CPU)


# What tests/ops/test_packing_feedback.py has compiled for all instructions.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("on_cpu", [name for name in FEWER if name != "all"], indirect=True)
@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_columns_are_chosen_with_fewer_instructions_too(on_cpu, fmt, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)
    check(kernels_of(on_cpu, "pack_columns")[0], fmt, torch.float32, None, CPU)


@pytest.mark.parametrize("wrong, message", [
    (("take_up(values, shares, columns, first, stop, columns);", ""), "not what the codes lack"),
    (("share, values[column][v], values[later][v]", "share, values[column][0], values[later][v]"), "not what the codes lack"),
    (("scale[v] = scales[v].scale[g]", "scale[v] = scales[v].scale[0]"), "mean error"),
    (("values[first + i][vector]", "values[i][vector]"), "mean error"),
    (("before = rounder[v].value(level[v]), wanted += before", "before = rounder[v].value(level[v])"), "mean error"),
    (("* sizeof(float));\n        else", "* sizeof(float) + 4);\n        else"), "beside the columns|not what the codes lack"),
], ids=range(6))
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("on_cpu", ["all"], indirect=True)
def test_a_wrong_choice_of_columns_is_found_out(on_cpu, wrong, message, monkeypatch):
    source = cpp_backend.kernel_source

    def broken(*args, **kwargs):
        text = source(*args, **kwargs)
        assert wrong[0] in text
        return text.replace(*wrong)

    monkeypatch.setattr(cpp_backend, "kernel_source", broken)
    monkeypatch.setattr(on_cpu, "_functions", {})
    with pytest.raises(WrongResult, match=message):
        check(kernels_of(on_cpu, "pack_columns")[0], FORMATS["Q3_K"], torch.float32, None, CPU)


@pytest.mark.parametrize("wrong", [("step <= 1", "step < -1"), ("nearest_integer(between(scaled", "(between(scaled"),
                                   ("best.d[lane];", "best.d[0];")], ids=lambda wrong: wrong[0])
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("on_cpu", ["all"], indirect=True)
def test_a_wrong_search_is_found_out(on_cpu, wrong, monkeypatch):
    source = cpp_backend.kernel_source
    monkeypatch.setattr(cpp_backend, "kernel_source", lambda *args, **kwargs: source(*args, **kwargs).replace(*wrong))
    monkeypatch.setattr(on_cpu, "_functions", {})
    with pytest.raises(WrongResult, match="mean error"):
        check(kernels_of(on_cpu, "pack_blocks")[0], FORMATS["Q3_K"], torch.float32, None, CPU)


@pytest.mark.usefixtures("fresh")
def test_packing_uses_the_kernel_and_a_part_is_packed_as_in_the_whole(monkeypatch):
    values = torch.randn(37, 512, generator=torch.Generator().manual_seed(0))
    runs, run = [], cpp_backend._kernels().pack_blocks
    monkeypatch.setattr(cpp_backend._kernels(), "pack_blocks", lambda *arguments: (runs.append(1), run(*arguments)))
    whole = packing.pack_tensor(values, FORMATS["Q4_K"])
    assert runs
    monkeypatch.setattr(packing, "CPU_SLICE_VALUES", 1024)
    assert torch.equal(packing.pack_tensor(values, FORMATS["Q4_K"])._qdata, whole._qdata)
    assert torch.equal(packing.pack_tensor(values[5:9], FORMATS["Q4_K"])._qdata.view(4, -1), whole._qdata.view(37, -1)[5:9])


def test_each_number_of_rows_has_one_product():
    for tokens in range(1, MOST_TOKENS[-1] + 1):
        assert sum(kernel.takes(tokens) for kernel in kernels_of(None, "linear")) == 1
    assert not any(kernel.takes(MOST_TOKENS[-1] + 1) for kernel in kernels_of(None, "linear"))


def unpack_a_block(kernels):
    kernels.unpack(FORMATS["Q4_0"], random_tensors(FORMATS["Q4_0"], 1, CPU), torch.empty(32), None, 0)


def test_a_kernel_is_compiled_once_for_a_compiler_and_a_cpu(tmp_path, monkeypatch):
    command, calls = tmp_path / "compiler", tmp_path / "calls"
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {COMMAND} "$@"\n')
    command.chmod(0o755)

    def compilations():
        unpack_a_block(CpuKernels(CppCompiler(str(command), tmp_path / "kernels")))
        return sum("kernel.cpp" in line for line in calls.read_text().splitlines())

    assert [compilations(), compilations()] == [1, 1]
    monkeypatch.setattr(cpp_backend, "_cpu", lambda: "another CPU")
    assert compilations() == 2


def test_what_the_compiler_refuses_is_said(tmp_path):
    with pytest.raises(CppError, match="nonsense"):
        CppCompiler(COMMAND, tmp_path).library("int x = nonsense;")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fresh(monkeypatch, tmp_path, caplog):
    """The kernel layer as at the start of ComfyUI, with nothing compiled yet."""
    monkeypatch.setattr(kernel_layer, "_selectors", {})
    wait_for_kernels(monkeypatch)
    monkeypatch.delenv(kernel_layer.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpp_backend._kernels.cache_clear()
    yield
    cpp_backend._kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_cpu_uses_them_unasked_and_keeps_them_in_the_users_cache(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    fmt, out = FORMATS["Q5_1"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    assert kernel_layer.find("unpack", CPU, fmt, out.dtype) is not None
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out), reference(fmt, tensors))
    assert "Packed weights on cpu use cpp" in caplog.text
    assert list((tmp_path / "cache/featherweight/kernels").glob("*.so"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("obstacle, why", [
    ("no compiler", "there is no C++ compiler"), ("a compiler that fails", "false:"),
    ("no place to write", "no folder can be written and run from; XDG_CACHE_HOME names another one")])
def test_torch_does_the_work_where_nothing_can_be_compiled_and_one_line_says_why(obstacle, why, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    if obstacle == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif obstacle == "a compiler that fails":
        monkeypatch.setenv("CXX", shutil.which("false"))
    else:
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(cpp_backend.tempfile, "TemporaryDirectory", full)
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out), reference(fmt, tensors))
    (line,) = caplog.records
    assert line.levelno == logging.INFO and "\n" not in line.message
    assert line.message.startswith("[Featherweight] Packed weights on cpu use torch, because no kernel works there (cpp: ")
    assert why in line.message


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_a_layer_with_bias_and_low_rank_branch_gives_the_values_of_the_dense_one(fmt, tokens):
    assert_layer_equals_the_dense_one(fmt, (2, tokens // 2))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("asked", ["torch", "cpp"])
@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_a_weight_whose_bytes_lie_in_pieces_gives_the_values_of_one_in_one_piece(name, asked, monkeypatch):
    monkeypatch.setenv(kernel_layer.VARIABLE, asked)
    fmt, (rows, columns) = FORMATS[name], (16, 512)
    whole = random_tensors(fmt, rows * columns // fmt.block_length, CPU, calm=True)
    whole[0] = whole[0].view(rows, -1)
    apart = [torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0] for tensor in whole]
    assert not any(tensor.is_contiguous() for tensor in apart)

    def values(tensors):
        weight = packed_tensor(fmt, tensors[0], (rows, columns), scale=tensors[1] if fmt.scales_apart else None)
        with product.unpacked_in_scratch(weight, torch.float32) as scratch:
            unpacked = scratch.clone()
        yield unpacked
        yield product.unpack(weight, torch.bfloat16)
        yield product.embedding(torch.tensor([3, 0, 15]), weight, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for tokens in (1, 3, 40):
            input = torch.randn((tokens, columns), generator=generator)
            yield product.linear(input, weight)
            yield int8.linear(input, weight)

    for got, expected in zip(values(apart), values(whole), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("fresh")
def test_a_wrong_source_is_off_with_the_reason_and_the_reference_is_used(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    source = cpp_backend.kernel_source
    monkeypatch.setattr(cpp_backend, "kernel_source", lambda *args, **kwargs: source(*args, **kwargs).replace("- 8)", "- 7)"))
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out), reference(fmt, tensors))
    assert "unpack of Q4_0 to float32 by cpp on cpu" in caplog.text
    assert "values differ from the reference" in caplog.text


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_a_weak_lora_arrives(tokens):
    assert_a_weak_lora_arrives(tokens)
