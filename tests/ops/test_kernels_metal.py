"""The Metal sources give the reference's values: run on the CPU, thread by thread, by the same Python."""
import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from featherweight.ops import kernels as kernel_layer
from featherweight.ops import product
from featherweight.ops.format import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels import metal_backend
from featherweight.ops.kernels.check import check, random_tensors
from featherweight.ops.kernels.metal_backend import BACKEND, unpack
from featherweight.ops.kernels.cxx_text import TYPES, kernel_source
from featherweight.ops.tensor import packed_tensor
from kernel_cases import (
    DTYPES, assert_a_weak_lora_arrives, assert_odd_weight_is_right, assert_same_bits, each_dtype, each_format,
    each_format_with, reference, wait_for_kernels,
)

ON_CPU = Path(__file__).with_name("metal_on_cpu")
CPP = os.environ.get("CXX") or shutil.which("g++")
CLANG = os.environ.get("CLANG") or shutil.which("clang")
CPU = torch.device("cpu")
COMPILE_SHADER = torch.mps.compile_shader

pytestmark = pytest.mark.skipif(CPP is None or sys.platform != "linux", reason="needs g++ on Linux")


class Function:
    """What `torch.mps` makes of a kernel. Takes only what torch takes, and what Metal's validation lets pass."""

    def __init__(self, library: ctypes.CDLL):
        sizes = (ctypes.c_int * 32)()
        self._element_bytes = sizes[:library.element_bytes(sizes)]
        self._launch = library.launch

    def __call__(self, *arguments, threads=None, group_size=None):
        assert len(arguments) == len(self._element_bytes)
        for argument, element_bytes in zip(arguments, self._element_bytes):
            assert isinstance(argument, torch.Tensor) and argument.numel()
            assert argument.storage_offset() * argument.itemsize % element_bytes == 0
        assert 0 < threads < 1 << 32 and 0 < group_size <= 1024
        self._launch((ctypes.c_void_p * len(arguments))(*(argument.data_ptr() for argument in arguments)),
                     ctypes.c_uint(threads))


class CpuShaders:
    """`torch.mps.compile_shader` for the CPU; what it returned has the kernel as an attribute."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, source: str):
        name = f"kernel{len(list(self.folder.iterdir()))}"
        text, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        text.write_text(f"{source}\nEXPORT(unpack)\n", encoding="utf-8")
        # A load from an address that is no multiple of an element ends the process.
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment,bounds",
                 "-fsanitize-undefined-trap-on-error", "-w", "-fPIC", "-shared"]
        built = subprocess.run([CPP, *flags, f"-I{ON_CPU}", str(text), "-o", str(library)], capture_output=True, text=True)
        if built.returncode:
            raise SyntaxError(built.stderr)
        library = ctypes.CDLL(str(library))
        library.unpack = Function(library)
        return library


@pytest.fixture(scope="module", autouse=True)
def on_cpu(tmp_path_factory):
    """The kernels as the backend compiles and starts them, where the device is this CPU."""
    shaders = CpuShaders(tmp_path_factory.mktemp("metal"))
    metal_backend._shader.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.mps, "compile_shader", shaders)
        yield
    metal_backend._shader.cache_clear()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_format_with("dtype", DTYPES)
def test_unpack_equals_the_reference_rounded_once(fmt, dtype):
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 600, CPU)
    expected = reference(fmt, tensors)
    out = torch.empty(len(expected), dtype=dtype)
    unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, expected.to(dtype))


@each_format_with("dtype", DTYPES)
def test_unpack_starts_at_any_block_and_writes_to_any_address(fmt, dtype):
    tensors = random_tensors(fmt, 6, CPU, calm=True)
    expected = fmt.unpack_into(tensors, torch.empty(3 * fmt.block_length - 8, dtype=dtype), first=2)
    out = torch.full((len(expected) + 2,), 7, dtype=dtype)
    unpack(fmt, tensors, out[1:-1], None, 2)
    assert_same_bits(out[1:-1], expected)
    assert out[0] == out[-1] == 7


@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["Q5_0"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_unpack_reads_from_any_address(fmt):
    tensors = random_tensors(fmt, 6, CPU)
    expected = fmt.unpack_into(tensors, torch.empty(6 * fmt.block_length))
    for offset in (1, 2):
        moved = torch.zeros(tensors[0].numel() + offset, dtype=torch.uint8)[offset:]
        moved.copy_(tensors[0].flatten())
        out = torch.empty_like(expected)
        unpack(fmt, [moved, *tensors[1:]], out, None, 0)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(7, 72), (5, 45), (0, 64)], ids=str)
def test_unpack_of_odd_weights_and_of_none(shape):
    assert_odd_weight_is_right(unpack, shape)


def test_unpack_of_blocks_that_are_no_whole_chunks():
    fmt = FORMATS["NF4"].of_block_length(12)
    tensors = random_tensors(fmt, 8, CPU)
    out = torch.empty(96)
    unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, reference(fmt, tensors))


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", [FORMATS["Q6_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_unpack_rounds_to_the_value_dtype_first(fmt, value_dtype):
    tensors = random_tensors(fmt, 40, CPU)
    out = torch.empty(40 * fmt.block_length)
    unpack(fmt, tensors, out, value_dtype, 0)
    assert_same_bits(out, fmt.unpack_into(tensors, torch.empty_like(out), value_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_are_rounded_once(dtype):
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65520.0, 65519.99, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 2.0 ** -25, 3.39e38]
    values = torch.cat([torch.randn(991) * 2.0 ** torch.randint(-24, 16, (991,)), torch.tensor(edges)])
    fmt = INT8.of_columns(8)
    codes = torch.ones(len(values), 8, dtype=torch.uint8)
    out = torch.empty(len(values), 8, dtype=dtype)
    unpack(fmt, [codes.flatten(), values], out, None, 0)
    assert_same_bits(out, values.to(dtype).unsqueeze(-1).expand(-1, 8))


@pytest.fixture
def flushed():
    """flushed(): from now on float32 subnormals are zero in torch and in the kernels, as on an Apple GPU."""
    def flush():
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot take subnormals for zero")

    yield flush
    torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_format
def test_the_check_has_no_subnormals_that_one_gpu_flushes_and_another_does_not(flushed, fmt):
    values = reference(fmt, random_tensors(fmt, 6000, CPU)).abs()
    assert not ((values > 0) & (values < 16 * torch.finfo(torch.float32).tiny)).any()
    flushed()
    check(BACKEND.kernels[0], fmt, torch.float32, None, CPU)


@each_dtype
def test_where_the_reference_has_zero_for_subnormals_the_kernel_has_too(flushed, dtype):
    fmt = FORMATS["MXFP4"]
    blocks = random_tensors(fmt, 256, CPU)[0]
    blocks[:, 0] = torch.arange(256)  # every scale
    flushed()
    expected = fmt.unpack_into([blocks], torch.empty(256 * fmt.block_length, dtype=dtype))
    assert not expected[:2 * fmt.block_length].any() and expected[2 * fmt.block_length:].any()
    out = torch.empty_like(expected)
    unpack(fmt, [blocks], out, None, 0)
    assert_same_bits(out, expected)


@pytest.mark.skipif(CLANG is None, reason="needs clang, or its name in CLANG")
@each_format
def test_no_pointer_strays_from_the_memory_it_points_into(fmt):
    """Of the compilers on every system only Clang keeps memories apart, as Metal's does."""
    for dtype in TYPES:
        source = kernel_source("metal", "unpack", fmt, dtype, torch.float16, LANES=metal_backend.CHUNK)
        made = subprocess.run([CLANG, "-x", "c++", "-std=c++14", "-w", "-fsyntax-only", f"-I{ON_CPU}", "-"], input=source,
                              capture_output=True, text=True)
        assert not made.returncode, made.stderr


def test_without_metal_the_backend_says_so(monkeypatch):
    if torch.backends.mps.is_available():
        pytest.skip("there is Metal")
    monkeypatch.setattr(torch.mps, "compile_shader", COMPILE_SHADER)
    metal_backend._shader.cache_clear()
    with pytest.raises(RuntimeError, match="MPS is not available"):
        BACKEND.probe(CPU)


@pytest.fixture
def as_device(monkeypatch, caplog):
    """The kernel layer, where metal is the backend of the CPU and nothing has been compiled yet."""
    monkeypatch.setattr(kernel_layer, "PRIORITY", {"cpu": ("metal",)})
    monkeypatch.setattr(kernel_layer, "_selectors", {})
    wait_for_kernels(monkeypatch)
    monkeypatch.setenv(kernel_layer.VARIABLE, "metal")
    metal_backend._shader.cache_clear()
    caplog.set_level(logging.DEBUG)
    yield
    metal_backend._shader.cache_clear()


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["NF4"]], ids=lambda fmt: fmt.__name__)
def test_a_layer_gives_the_values_of_the_dense_one(fmt, caplog):
    rows, columns, generator = 20, 512, torch.Generator().manual_seed(0)
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, calm=True)
    dense = fmt.unpack_into(tensors, torch.empty(rows, columns))
    weight = packed_tensor(fmt, tensors[0], (rows, columns), scale=tensors[1] if fmt.scales_apart else None)
    input, bias = torch.randn((2, 5, columns), generator=generator), torch.randn(rows, generator=generator)
    assert torch.equal(product.linear(input, weight, bias), torch.nn.functional.linear(input, dense, bias))
    ids = torch.tensor([[3, 0], [19, 3]])
    assert torch.equal(product.embedding(ids, weight, torch.float32), dense[ids])
    assert "Packed weights on cpu use metal" in caplog.text
    assert kernel_layer.find("unpack", CPU, fmt, torch.float32) is unpack


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("wrong, reason", [("- 31", "values differ from the reference"), ("- many", "many")],
                         ids=["wrong values", "no Metal"])
def test_a_wrong_source_is_off_with_the_reason_and_the_reference_is_used(monkeypatch, caplog, wrong, reason):
    monkeypatch.setattr(metal_backend, "kernel_source",
                        lambda *args, **definitions: kernel_source(*args, **definitions).replace("- 32", wrong))
    fmt, out = FORMATS["Q6_K"], torch.empty(8 * 256, dtype=torch.float16)
    tensors = random_tensors(fmt, 8, CPU)
    assert kernel_layer.find("unpack", CPU, fmt, out.dtype) is None
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out), fmt.unpack_into(tensors, torch.empty_like(out)))
    assert "unpack of Q6_K to float16 by metal" in caplog.text and reason in caplog.text


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("tokens", [4, 40])
def test_a_weak_lora_arrives(tokens):
    assert_a_weak_lora_arrives(tokens)
