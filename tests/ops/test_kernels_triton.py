"""Triton's kernels against gguf and bitsandbytes, bit for bit, on a GPU or in Triton's interpreter, and compiled for others.

The interpreter must be chosen before triton is imported. So where there is no GPU, one test here runs this file again in a
process of its own, and the rest waits for that. There, products and stores in bfloat16 are wrong: Triton's interpreter
truncates where a GPU rounds. So bfloat16 runs on a GPU only, and is compiled everywhere. As the interpreter is slow, some of
what differs in one respect only from a case that runs is left to `--heavy` there.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from featherweight.ops import formats, int8_codes, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels.check import check
from featherweight.ops.low_rank import LowRank, Slice
from featherweight.ops.tensor import packed_tensor
from gguf import GGMLQuantizationType
from kernel_cases import assert_a_weak_lora_arrives, wait_for_kernels

from devtools.files.gguf_files import block_pool

triton = pytest.importorskip("triton", reason="Triton is not installed")
from featherweight.ops.kernels import triton_backend  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRETED or not torch.cuda.is_available() else torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
runs_kernels = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="runs in the interpreter's process")

DECODED = sorted(triton_backend.DECODERS)
BNB = ["FP4", "NF4"]
GGML = [name for name in DECODED if name in GGMLQuantizationType.__members__]
ONE_OF_A_KIND = {"Q6_K", "IQ4_XS", "NF4"}  # plain blocks, with a codebook, with scales apart
each_ggml_format = pytest.mark.parametrize("name", GGML)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def slow(*values, unless=False):
    """A case that the interpreter runs only for `--heavy`."""
    return pytest.param(*values, marks=[pytest.mark.heavy] if DEVICE.type == "cpu" and not unless else [])


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="the kernels run in this process")
def test_every_kernel_is_right_in_the_interpreter(request):
    heavy = ["--heavy"] * request.config.getoption("--heavy")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *heavy, str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True, scope="module")
def chosen_anew():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "triton")
        patch.setattr(kernels, "_selectors", {})
        wait_for_kernels(patch)
        if INTERPRETED:
            patch.setitem(kernels.PRIORITY, "cpu", (*kernels.PRIORITY["cpu"], "triton"))
            # A value takes ten thousand times as long.
            patch.setattr(sys.modules[check.__module__], "MANY", 3 * triton_backend.UNPACK_TILE // 2)
        yield


def ggml_values(name: str, blocks: np.ndarray) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType[name]))


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor):
    """Equal bit patterns; any NaN equals any NaN."""
    values = values.cpu()
    assert values.dtype == expected.dtype and values.shape == expected.shape
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    same = (values.view(bits) == expected.view(bits)) | (values.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} values differ, the first at {(~same).nonzero()[0].tolist()}"


def unpacked(packed_format, tensors, count, dtype, value_dtype=None, first=0):
    """`count` values by the kernel alone, in a buffer whose end must stay as it is."""
    run = kernels.find("unpack", DEVICE, packed_format, dtype, value_dtype)
    assert run is triton_backend.unpack
    buffer = torch.full((count + 64,), 7.0, dtype=dtype, device=DEVICE)
    run(packed_format, [tensor.to(DEVICE) for tensor in tensors], buffer[:count], value_dtype, first)
    assert (buffer[count:] == 7).all()
    return buffer[:count]


@runs_kernels
@each_dtype
@each_ggml_format
def test_unpacks_to_ggufs_values(name, dtype):
    packed_format = FORMATS[name]
    blocks = np.random.default_rng(packed_format.ggml_type).integers(0, 256, (301, packed_format.block_bytes), dtype=np.uint8)
    expected = ggml_values(name, blocks).flatten().to(dtype)
    data = torch.from_numpy(blocks)
    for first, count in ((0, 301), (0, 1), (3, 298), (128, 16)):
        start, length = first * packed_format.block_length, count * packed_format.block_length
        values = unpacked(packed_format, [data], length, dtype, first=first)
        assert_same_bits(values, expected[start:start + length])


@runs_kernels
@pytest.mark.parametrize("offset", [1, 2])
def test_unpacks_bytes_at_any_address(offset, monkeypatch):
    """A GPU refuses to load two bytes from an odd address."""
    kernel, addresses = triton_backend._unpack, []

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **options: (addresses.append(args[0].data_ptr()), kernel[grid](*args, **options))

    monkeypatch.setattr(triton_backend, "_unpack", Watched())
    data = torch.zeros(offset + 144 * 5, dtype=torch.uint8, device=DEVICE)[offset:]
    blocks = block_pool("Q4_K")[:5]
    data.copy_(torch.from_numpy(blocks).flatten())
    assert data.data_ptr() % 4
    assert_same_bits(unpacked(FORMATS["Q4_K"], [data], 5 * 256, torch.float32), ggml_values("Q4_K", blocks).flatten())
    assert addresses and not any(address % 4 for address in addresses)


def by_bitsandbytes(name, block_length, count):
    """A format, its tensors and the values of `count` numbers that bitsandbytes packs."""
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(values, blocksize=block_length, quant_type=name.lower())
    codes = torch.stack([data.flatten().int() >> 4, data.flatten().int() & 15], -1).flatten()[:count]
    expected = state.code[codes.long()] * state.absmax.repeat_interleave(block_length)[:count]
    return FORMATS[name].of_block_length(block_length), [data, state.absmax], expected


@runs_kernels
@each_dtype
@pytest.mark.parametrize("count", [1, 45, 7 * 72, 4096, 12 * 1024 + 33])
@pytest.mark.parametrize("block_length", [64, 128, 4096])
@pytest.mark.parametrize("name", BNB)
def test_unpacks_to_bitsandbytes_values(name, block_length, count, dtype):
    packed_format, tensors, expected = by_bitsandbytes(name, block_length, count)
    assert_same_bits(unpacked(packed_format, tensors, count, dtype), expected.to(dtype))


@runs_kernels
@each_dtype
def test_unpacks_int8_rows(dtype):
    columns, rows = 96, 77
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator)
    values = unpacked(INT8.of_columns(columns), [codes.view(torch.uint8), scale], rows * columns, dtype)
    assert_same_bits(values, torch.from_numpy(codes.numpy() * scale.numpy()[:, None]).flatten().to(dtype))


@runs_kernels
def test_blocks_that_are_no_groups_go_to_the_reference():
    packed_format = FORMATS["NF4"].of_block_length(24)
    assert kernels.find("unpack", DEVICE, packed_format, torch.float32) is None


def weight_of(name, rows, columns):
    """A packed weight on the device and its values, float32 (rows, columns)."""
    if name == "INT8":
        packed_format = INT8.of_columns(columns)
        values = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))
        scale = values.abs().amax(-1) / 127
        codes = (values / scale[:, None]).round().to(torch.int8)
        tensors, values = [codes.view(torch.uint8).flatten(), scale], codes * scale[:, None]
    elif name in BNB:
        packed_format, tensors, values = by_bitsandbytes(name, FORMATS[name].block_length, rows * columns)
    else:
        packed_format = FORMATS[name]
        blocks = np.resize(block_pool(name), (rows * columns // packed_format.block_length, packed_format.block_bytes))
        tensors, values = [torch.from_numpy(blocks)], ggml_values(name, blocks)
    data, *scale = (tensor.to(DEVICE) for tensor in tensors)
    return packed_tensor(packed_format, data, (rows, columns), torch.float32, *scale), values.view(rows, columns)


@runs_kernels
@pytest.mark.parametrize("name, tokens, run, dtype", [
    *(slow(name, tokens, run, dtype, unless=dtype == torch.float32 or name in ONE_OF_A_KIND)
      for name in DECODED for tokens, run in ((1, "vector"), (5, "few_rows")) for dtype in DTYPES),
    *(("Q4_K", tokens, run, dtype) for tokens, run in ((2, "few_rows"), (16, "few_rows"), (17, None)) for dtype in DTYPES),
])
def test_multiplies_as_float64_does(name, tokens, run, dtype):
    rows, columns = 19, 1280  # neither is whole tiles
    weight, values = weight_of(name, rows, columns)
    found = kernels.find("linear", DEVICE, weight.layout_cls.format, dtype, None, tokens)
    assert found is (getattr(triton_backend, run) if run else None)
    generator = torch.Generator().manual_seed(tokens)
    input, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, columns), (rows,)))
    down, up = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, columns), (rows, 2)))
    for branch in (None, (down, up)):
        change = 0 if branch is None else up.double() @ down.double()
        expected = input.double() @ (values.double() + change).t() + bias.double()
        low_rank = None if branch is None else LowRank(down, (up,), (Slice(0, rows, 0, 2),)).to(DEVICE)
        got = product.linear(input.to(DEVICE), weight, bias.to(DEVICE), None, low_rank).cpu()
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    expected = input.double() @ values.double().t()
    without_bias = product.linear(input.to(DEVICE), weight).cpu().double()
    assert (without_bias - expected).norm() < 8e-3 * expected.norm()


# `find` gives a kernel only after it was right in each case of `check`.


@runs_kernels
@each_dtype
def test_unpacks_through_another_dtype(dtype):
    through = torch.float16 if dtype != torch.float16 else torch.float32
    found = kernels.find("unpack", DEVICE, FORMATS["NF4"], dtype, through)
    assert found is triton_backend.unpack


@runs_kernels
@pytest.mark.parametrize("name", [slow(name, unless=name in ONE_OF_A_KIND) for name in DECODED])
def test_codes_the_rows_of_a_weight(name):
    packed_format = INT8.of_columns(256) if name == "INT8" else FORMATS[name]
    found = kernels.find("int8_rows", DEVICE, packed_format, torch.int8, torch.float16)
    assert found is triton_backend.int8_rows


@runs_kernels
@each_dtype
def test_codes_rows_of_the_input(dtype):
    assert kernels.find("int8_tokens", DEVICE, None, dtype) is triton_backend.int8_tokens


# Without a GPU, compiled for all of them.

TARGETS = {f"sm_{arch}": ("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {"gfx1100": ("hip", "gfx1100", 32), "gfx1201": ("hip", "gfx1201", 32), "gfx942": ("hip", "gfx942", 64)}
USUAL = {"sm_80", "gfx942"}
SHARED_MEMORY = 48 << 10  # that every GPU gives a program


def case(target, name):
    heavy = target not in USUAL and name not in ONE_OF_A_KIND
    return pytest.param(target, name, id=f"{target}-{name}", marks=[pytest.mark.heavy] if heavy else [])


class Compiled:
    """In the place of a jitted kernel: what would be launched is compiled for a target instead."""

    def __init__(self, kernel, target: tuple):
        self.kernel, self.target = kernel, GPUTarget(*target)

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        names = self.kernel.arg_names
        values = {**dict(zip(names, args)), **{name: options.pop(name) for name in list(options) if name in names}}
        types, constants, aligned = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            if isinstance(value, torch.Tensor):
                types[name] = "*" + {torch.uint8: "u8", torch.int8: "i8", torch.float32: "fp32", torch.float16: "fp16",
                                     torch.bfloat16: "bf16"}[value.dtype]
            else:
                special = type(value) is not int or parameter.is_constexpr or value == 1 and not parameter.do_not_specialize
                types[name] = "constexpr" if special else "i32"
            if types[name] == "constexpr":
                constants[name] = value
            elif types[name] != "i32" or value % 16 == 0 and not parameter.do_not_specialize:
                aligned[index,] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, types, constants, aligned)
        self.result = triton.compile(source, target=self.target, options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("target, name", [case(target, name) for target in TARGETS for name in DECODED])
def test_compiles_for(target, name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, columns = 64, 4096
    packed_format = INT8.of_columns(columns) if name == "INT8" else FORMATS[name]
    blocks = rows * columns // packed_format.block_length
    tensors = [torch.zeros(blocks * packed_format.block_bytes, dtype=torch.uint8), torch.zeros(blocks)]
    results = {}

    def launch(function, kernel, *args):
        arguments = args if kernel == "_int8_tokens" else (packed_format, tensors, *args)
        compiled = Compiled(getattr(triton_backend, kernel), TARGETS[target])
        with monkeypatch.context() as patch:
            patch.setattr(triton_backend, kernel, compiled)
            function(*arguments)
        assert compiled.result.metadata.shared <= SHARED_MEMORY
        results[kernel] = compiled.result

    launch(triton_backend.unpack, "_unpack", torch.zeros(rows, columns, dtype=torch.bfloat16), None, 0)
    dtypes = (torch.float32, torch.bfloat16) if name in {*ONE_OF_A_KIND, *BNB} else (torch.float16,)
    for function, kernel, tokens, dtype in ((triton_backend.vector, "_vector", 1, torch.bfloat16),
                                            *((triton_backend.few_rows, "_few_rows", 3, dtype) for dtype in dtypes)):
        input, out = torch.zeros(tokens, columns, dtype=dtype), torch.zeros(tokens, rows, dtype=dtype)
        launch(function, kernel, input, torch.zeros(rows, dtype=dtype).expand(tokens, rows), out, None)
    codes, scales = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows)
    launch(triton_backend.int8_rows, "_int8_rows", codes, scales, None, 0)
    launch(triton_backend.int8_tokens, "_int8_tokens", torch.zeros(rows, columns, dtype=torch.bfloat16), codes, scales)
    fused = re.compile(r"fma\.rn\.f32|v_(pk_|dual_)?fmac?_f32")  # a fused multiply-add in place of two roundings changes bits
    assembly = "ptx" if target.startswith("sm_") else "amdgcn"
    assert not fused.search(results["_unpack"].asm[assembly])
    assert fused.search(results["_vector"].asm[assembly])


@runs_kernels
@pytest.mark.parametrize("tokens", [slow(4), 16])
def test_a_weak_lora_arrives(tokens):
    assert_a_weak_lora_arrives(tokens)
