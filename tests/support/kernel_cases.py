"""Formats and references for the tests of kernels in C++."""
import contextlib
import sys

import gguf
import pytest
import torch
from featherweight.ops import formats, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS, GGML_FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels import cpp_backend, selector
from featherweight.ops.kernels.check import random_tensors
from featherweight.ops.kernels.cxx_text import FORMAT_NAMES
from featherweight.ops.low_rank import LowRank, Slice
from featherweight.ops.tensor import packed_tensor
from gguf import GGMLQuantizationType
from lora_gain import assert_full_strength

from devtools.measure.weights import random_weight

CODEBOOKS = [FORMATS["NF4"], FORMATS["FP4"]]
BASIC_FORMATS = [*(fmt for fmt in GGML_FORMATS.values() if fmt.__name__ in FORMAT_NAMES), *CODEBOOKS, INT8.of_columns(96)]
ALL_FORMATS = BASIC_FORMATS + [fmt.of_block_length(length) for fmt in CODEBOOKS for length in (32, 4096)]
ONE_OF_EACH_SOURCE = {fmt.__module__: fmt for fmt in BASIC_FORMATS}.values()
BITS = {4: torch.int32, 2: torch.int16}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wait_for_kernels(monkeypatch):
    """The first call waits for every kernel, that of "unpack" too."""
    monkeypatch.setattr(selector, "WAIT_SECONDS", dict.fromkeys(selector.WAIT_SECONDS, 120))


@contextlib.contextmanager
def cpu_kernels(cache_folder):
    """Kernels of this CPU, compiled into a cache of their own, and waited for."""
    if sys.platform == "win32" or cpp_backend.cpp_compiler() is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(cache_folder))
        patch.setattr(kernels, "_selectors", {})
        wait_for_kernels(patch)
        cpp_backend._kernels.cache_clear()
        yield patch
    cpp_backend._kernels.cache_clear()


def each_format_with(name: str, values, indirect: bool = False):
    """Cases of a test that compiles for each and whose `values` mean the same to all formats.

    Every format meets the first value, and a format of each source the others; what is left is heavy.
    """
    first, *_ = values
    cases = [pytest.param(fmt, value, id=f"{fmt.__name__}-{value}",
                          marks=() if value == first or fmt in ONE_OF_EACH_SOURCE else pytest.mark.heavy)
             for value in values for fmt in ALL_FORMATS]
    return pytest.mark.parametrize(f"fmt, {name}", cases, indirect=[name] if indirect else False)


def assert_same_bits(values, expected):
    bits = BITS[values.dtype.itemsize]
    wrong = (values.view(bits) != expected.view(bits)) & ~(values.isnan() & expected.isnan())
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} values differ, the first at {wrong.nonzero()[0].tolist()}"


def reference(fmt, tensors) -> torch.Tensor:
    """float32 values by gguf, or by bitsandbytes' definition."""
    if fmt.ggml_type is not None:
        return torch.from_numpy(gguf.quants.dequantize(tensors[0].numpy(), GGMLQuantizationType(fmt.ggml_type))).flatten()
    if issubclass(fmt, INT8):
        values = tensors[0].view(torch.int8).float()
    else:
        values = torch.tensor(fmt.codebook)[torch.stack([tensors[0] >> 4, tensors[0] & 15], -1).flatten().long()]
    return values * tensors[1].repeat_interleave(fmt.block_length)


def assert_odd_weight_is_right(unpack, shape: tuple[int, int]):
    """An NF4 weight whose last block may be short."""
    fmt, count = FORMATS["NF4"], shape[0] * shape[1]
    packed, scales = random_tensors(fmt, -(-count // 64) or 1, torch.device("cpu"))
    tensors = [packed[:-(-count // 2)], scales[:-(-count // 64)]]
    out = torch.empty(shape, dtype=torch.float16)
    unpack(fmt, tensors, out, None, 0)
    assert_same_bits(out, fmt.unpack_into(tensors, torch.empty_like(out)))


def assert_product_rounds_once(kernels, tokens: int, dtype: torch.dtype, offset: int = 0):
    """Rows that no share of a thread divides, an addend of odd strides, an input `offset` values after an even address."""
    fmt, rows, columns = FORMATS["Q4_K"], 13, 1280
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, torch.device("cpu"), calm=True)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(tokens * columns + offset, generator=generator).to(dtype)[offset:].view(tokens, columns)
    addend = torch.randn((rows, tokens), generator=generator).to(dtype).t()
    run = next(kernel for kernel in kernels if kernel.takes(tokens)).run
    weight = fmt.unpack_into(tensors, torch.empty(rows, columns)).double()
    for added in (addend, None):
        out = torch.full((tokens, rows), torch.nan, dtype=dtype)
        run(fmt, tensors, input, added, out, None)
        expected = input.double() @ weight.t() + (0 if added is None else added)
        allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * (input.double().abs() @ weight.abs().t())
        assert ((out - expected).abs() <= allowed).all()


def assert_layer_equals_the_dense_one(fmt, tokens: tuple[int, int]):
    """A layer with bias and low-rank branch, and rows of its weight. tokens: the first dimensions of the input."""
    rows, columns, generator = 20, 512, torch.Generator().manual_seed(0)
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, torch.device("cpu"), calm=True)
    dense = fmt.unpack_into(tensors, torch.empty(rows, columns)).double()
    weight = packed_tensor(fmt, tensors[0], (rows, columns), scale=tensors[1] if fmt.scales_apart else None)
    input, bias, down, up = (torch.randn(shape, generator=generator) for shape in
                             ((*tokens, columns), (rows,), (4, columns), (rows, 4)))
    got = product.linear(input, weight, bias, low_rank=LowRank(down, (up,), (Slice(0, rows, 0, 4),)))
    expected = torch.nn.functional.linear(input.double(), dense + up.double() @ down.double(), bias.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
    ids = torch.tensor([[3, 0], [19, 3]])
    assert torch.equal(product.embedding(ids, weight, torch.float32), dense.float()[ids])


def assert_a_weak_lora_arrives(tokens: int):
    """Beside a bias, through whatever kernels are chosen now, in a dtype whose step is larger than what the LoRA changes."""
    rows, columns, norm, dtype = 1024, 64, 0.0005, torch.float16
    weight = random_weight("Q8_0", (rows, columns))
    dense = product.unpack(weight, torch.float32)
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
    bias = (torch.randn(rows, generator=generator) * dense.std() * columns ** 0.5).to(dtype)

    def run(input, strength):
        low_rank = LowRank(down.to(dtype), ((strength * up).to(dtype),), (Slice(0, rows, 0, 4),))
        return product.linear(input, weight, bias, None, low_rank)

    inputs = [torch.randn(tokens, columns, generator=generator).to(dtype) for _ in range(max(1, 96 // tokens))]
    change = up @ down
    base = (dense.norm() / change.norm()).item()
    assert_full_strength(run, inputs, lambda strength: strength * change, (norm,), base)
