"""What only Triton has: addresses of bytes, and that the kernels compile for every GPU.

test_backends.py tests what they compute. This file runs its cases for Triton in a process of
its own: on a GPU, or in Triton's interpreter, which must be chosen before triton is imported. The
interpreter's products and stores in bfloat16 are wrong, because it truncates where a GPU rounds. So
bfloat16 runs on a GPU only, and is compiled everywhere.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_backends import INTERPRETED, ON_A_GPU, device_of
from kernel_cases import CPU, ROW_SIZES, assert_same_bits, each_row_format, reference

from featherweight.ops import formats  # noqa: F401
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels import validation
from featherweight.ops.kernels.kernel import WrongResult
from featherweight.ops.kernels.validation import check, misaligned_copy, random_tensors

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402

from featherweight.ops.kernels import triton_backend  # noqa: E402

DECODED = sorted(triton_backend.DECODERS)
FORMAT_SAMPLE = ("Q6_K", "IQ4_XS", "NF4")  # plain blocks, with a codebook, with scales apart
SUITE = Path(__file__).with_name("test_backends.py")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_every_kernel_is_right_on_a_gpu_or_in_the_interpreter(request):
    heavy = ["--heavy"] * request.config.getoption("--heavy")
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", *heavy, "-k", "triton", "-p",
        "no:xdist",
        str(SUITE), *([] if ON_A_GPU else [__file__])
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {} if ON_A_GPU else {"TRITON_INTERPRET": "1"}
    )
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


runs_kernels = pytest.mark.skipif(not (INTERPRETED or ON_A_GPU),
                                  reason="runs in the interpreter's process")


@runs_kernels
@pytest.mark.parametrize("offset", [1, 2])
def test_dequantizes_bytes_at_any_address(offset, monkeypatch):
    """A GPU refuses to load two bytes from an odd address."""
    kernel, addresses = triton_backend._dequantize, []

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **options: (addresses.append(args[0].data_ptr()), kernel[grid]
                                             (*args, **options))

    monkeypatch.setattr(triton_backend, "_dequantize", Watched())
    device = device_of(triton_backend.BACKEND)
    blocks = random_tensors(FORMATS["Q4_K"], 5, device)[0]
    data = misaligned_copy(blocks, offset)
    assert data.data_ptr() % 4
    out = torch.empty(5 * 256, device=device)
    triton_backend.dequantize(FORMATS["Q4_K"], [data], out, 0)
    assert_same_bits(out, reference(FORMATS["Q4_K"], [blocks.cpu()]))
    assert addresses and not any(address % 4 for address in addresses)


@runs_kernels
def test_blocks_that_do_not_divide_into_groups_are_refused():
    fmt = FORMATS["NF4"].of_block_length(24)
    with pytest.raises(NotImplementedError, match="blocks of 24 values"):
        triton_backend.dequantize(fmt, random_tensors(fmt, 4, CPU), torch.empty(96), 0)


def row_kernel(packed_format):
    kernel, = (kernel for kernel in triton_backend.BACKEND.kernels
               if kernel.capability == "dequantize"
               and kernel.accepts(packed_format, torch.float32))
    return kernel


@runs_kernels
@each_row_format
def test_a_row_has_the_bits_of_the_reference(name, size):
    packed_format, device = FAMILIES[name].of_columns(*size), device_of(triton_backend.BACKEND)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(validation, "MANY", 3 * triton_backend.DEQUANTIZE_TILE // 2)
        for dtype in (torch.float32, torch.float16):
            check(row_kernel(packed_format), packed_format, dtype, device)


@runs_kernels
def test_a_wrong_number_of_a_code_is_seen(monkeypatch):
    packed_format = FAMILIES["NVFP4_ROWS"].of_columns(96)
    kernel, launch = row_kernel(packed_format), triton_backend._launch

    def other_table(kernel, programs, device, *arguments, **constants):
        numbers = arguments[3].clone()
        numbers[3] += 0.5
        launch(kernel, programs, device, *arguments[:3], numbers, *arguments[4:], **constants)

    monkeypatch.setattr(triton_backend, "_launch", other_table)
    with pytest.raises(WrongResult, match="differ from the reference"):
        check(kernel, packed_format, torch.float32, None, device_of(triton_backend.BACKEND))


# Without a GPU, compiled for all of them.

TARGETS = {f"sm_{arch}": ("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {
    "gfx1100": ("hip", "gfx1100", 32), "gfx1201": ("hip", "gfx1201", 32),
    "gfx942": ("hip", "gfx942", 64)
}
MAIN_TARGETS = "sm_80", "gfx942"
OTHER_TARGETS = "sm_75", "sm_120", "gfx1100"  # the oldest, the newest, AMD's with 32 threads
INT8_TARGETS = *MAIN_TARGETS, "sm_75", "gfx1100"  # the oldest, and one of AMD's with 32 threads
SHARED_MEMORY = 48 << 10  # that every GPU gives a program


def cases():
    """Returns each format for one of the main targets, and one format for each of `OTHER_TARGETS`.
    The rest is heavy."""
    usual = {(target, name) for index, target in enumerate(MAIN_TARGETS)
             for name in DECODED[index::2]}
    usual |= {*zip(OTHER_TARGETS, FORMAT_SAMPLE)}
    return [pytest.param(target, name, marks=() if (target, name) in usual else pytest.mark.heavy)
            for target in TARGETS for name in DECODED]


POINTERS = {torch.uint8: "*u8", torch.int8: "*i8", torch.float32: "*fp32",
            torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Compiled:
    """Replaces a jitted kernel: compiles for a target instead of launching."""

    def __init__(self, kernel, target: tuple):
        self.kernel, self.target = kernel, GPUTarget(*target)

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        names = self.kernel.arg_names
        values = {
            **dict(zip(names, args)),
            **{name: options.pop(name) for name in list(options) if name in names}
        }
        types, constants, aligned = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            if isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
            else:
                is_constant = (type(value) is not int or parameter.is_constexpr
                               or (value == 1 and not parameter.do_not_specialize))
                types[name] = "constexpr" if is_constant else "i32"
            if types[name] == "constexpr":
                constants[name] = value
            elif types[name] != "i32" or (value % 16 == 0 and not parameter.do_not_specialize):
                aligned[index,] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, types, constants, aligned)
        self.result = triton.compile(source, target=self.target, options=options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What is compiled for a target is the same for several formats."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("target", "name"), cases())
def test_compiles_for(target, name, cache, monkeypatch, request):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    rows, columns = 64, 4096
    packed_format = INT8.of_columns(columns) if name == "INT8" else FORMATS[name]
    blocks = rows * columns // packed_format.block_length
    tensors = [
        torch.zeros(blocks * packed_format.block_bytes, dtype=torch.uint8),
        torch.zeros(blocks)
    ]
    results = {}

    def launch(function, kernel, *args):
        arguments = args if kernel == "_int8_tokens" else (packed_format, tensors, *args)
        compiled = Compiled(getattr(triton_backend, kernel), TARGETS[target])
        with monkeypatch.context() as patch:
            patch.setattr(triton_backend, kernel, compiled)
            function(*arguments)
        assert compiled.result.metadata.shared <= SHARED_MEMORY
        results[kernel] = compiled.result

    values = torch.zeros(rows, columns, dtype=torch.bfloat16)
    launch(triton_backend.dequantize, "_dequantize", values, 0)
    is_heavy = request.config.getoption("--heavy")
    is_in_sample = name in {*FORMAT_SAMPLE, "FP4"}
    dtypes = (torch.bfloat16,) if is_in_sample else (torch.float16,)
    if is_in_sample and (is_heavy or target in MAIN_TARGETS):
        dtypes += torch.float32,
    one_token = triton_backend.linear_one_token, "_linear_one_token", 1, torch.bfloat16
    few_tokens = [(triton_backend.linear_few_tokens, "_linear_few_tokens", 3, dtype)
                  for dtype in dtypes]
    for function, kernel, tokens, dtype in (one_token, *few_tokens):
        input = torch.zeros(tokens, columns, dtype=dtype)
        out = torch.zeros(tokens, rows, dtype=dtype)
        bias = torch.zeros(rows, dtype=dtype).expand(tokens, rows)
        launch(function, kernel, input, bias, out, None)
    if is_heavy or (is_in_sample and target in INT8_TARGETS):
        codes, scales = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows)
        launch(triton_backend.int8_rows, "_int8_rows", codes, scales, 0)
        launch(triton_backend.int8_tokens, "_int8_tokens",
               torch.zeros(rows, columns, dtype=torch.bfloat16), codes, scales)
    # A fused multiply-add rounds once instead of twice, which changes bits.
    fused = re.compile(r"fma\.rn\.f32|v_(pk_|dual_)?fmac?_f32")
    assembly = "ptx" if target.startswith("sm_") else "amdgcn"
    assert not fused.search(results["_dequantize"].asm[assembly])
    assert fused.search(results["_linear_one_token"].asm[assembly])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ROW_SIZES)
@pytest.mark.parametrize("target", [
    pytest.param(target, marks=() if target in MAIN_TARGETS else pytest.mark.heavy)
    for target in TARGETS])
def test_rows_compile_for(target, name, cache, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    packed_format = FAMILIES[name].of_columns(512)
    compiled = Compiled(triton_backend._dequantize_rows, TARGETS[target])
    monkeypatch.setattr(triton_backend, "_dequantize_rows", compiled)
    tensors = random_tensors(packed_format, 8, CPU)
    triton_backend.dequantize_rows(packed_format, tensors,
                                   torch.empty(8, 512, dtype=torch.bfloat16), 0)
    assert compiled.result.metadata.shared <= SHARED_MEMORY
    # integers are summed exactly, so a rotation may fuse
    fused = re.compile(r"fma\.rn\.f32|v_(pk_|dual_)?fmac?_f32")
    assembly = compiled.result.asm["ptx" if target.startswith("sm_") else "amdgcn"]
    if not packed_format.layout.rotation:
        assert not fused.search(assembly)
