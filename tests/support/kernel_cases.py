"""Formats and references for the tests of kernels."""
import contextlib
import sys
from pathlib import Path

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
CPU = torch.device("cpu")
BITS = {4: torch.int32, 2: torch.int16}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wait_for_kernels(monkeypatch):
    """The first call waits for every kernel, that of "unpack" too."""
    monkeypatch.setattr(selector, "WAIT_SECONDS", dict.fromkeys(selector.WAIT_SECONDS, 120))


def shared_cache(tmp_path_factory) -> Path:
    """A user's cache folder for all tests of a process whose subject it is not."""
    folder = tmp_path_factory.getbasetemp() / "user_cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def cpu_kernels(cache_folder):
    """Kernels of this CPU, compiled into a cache folder, and waited for."""
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


def assert_same_bits(values, expected):
    """Equal bit patterns; any NaN equals any NaN. values: on any device."""
    values = values.cpu()
    assert values.dtype == expected.dtype and values.shape == expected.shape
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


def assert_odd_weight_is_right(unpack, shape: tuple[int, int], device: torch.device):
    """An NF4 weight whose last block may be short."""
    fmt, count = FORMATS["NF4"], shape[0] * shape[1]
    packed, scales = random_tensors(fmt, -(-count // 64) or 1, CPU)
    tensors = [packed[:-(-count // 2)], scales[:-(-count // 64)]]
    out = torch.empty(shape, dtype=torch.float16, device=device)
    unpack(fmt, [tensor.to(device) for tensor in tensors], out, None, 0)
    assert_same_bits(out, fmt.unpack_into(tensors, torch.empty(shape, dtype=torch.float16)))


def assert_product_rounds_once(kernels, tokens: int, dtype: torch.dtype, device: torch.device):
    """Rows that no share of a thread divides, an addend of odd strides, an input one value after an
    even address. A kernel may round the weight's values to `dtype` before it multiplies."""
    fmt, rows, columns = FORMATS["Q4_K"], 13, 1280
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, calm=True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 + tokens * columns, generator=generator).to(device, dtype)
    input = values[1:].view(tokens, columns)  # loads of four bytes and more are of no even address
    addend = torch.randn((rows, tokens), generator=generator).to(device, dtype).t()
    run = next(kernel for kernel in kernels if kernel.takes(tokens)).run
    weight = fmt.unpack_into(tensors, torch.empty(rows, columns))
    for added in (addend, None):
        out = torch.full((tokens, rows), torch.nan, dtype=dtype, device=device)
        run(fmt, [tensor.to(device) for tensor in tensors], input, added, out, None)
        assert any(is_rounded_once(out, input, multiplied.double(), added)
                   for multiplied in (weight, weight.to(dtype)))


def is_rounded_once(out, input, weight, added) -> bool:
    """Whether `out` is `input @ weight.T + added`, summed in float32. weight: float64."""
    input = input.cpu().double()
    expected = input @ weight.t() + (0 if added is None else added.cpu())
    half_a_step = torch.finfo(out.dtype).eps / 2 * expected.abs()
    allowed = half_a_step + 1e-6 * (input.abs() @ weight.abs().t())
    return bool(((out.cpu() - expected).abs() <= allowed).all())


def assert_layer_equals_the_dense_one(fmt, tokens: tuple[int, int], device: torch.device):
    """A layer with bias and low-rank branch, and rows of its weight.

    Args:
        tokens: the first dimensions of the input.
    """
    rows, columns, generator = 20, 512, torch.Generator().manual_seed(0)
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, calm=True)
    dense = fmt.unpack_into(tensors, torch.empty(rows, columns)).double()
    data, *scale = (tensor.to(device) for tensor in tensors)
    weight = packed_tensor(fmt, data, (rows, columns), torch.float32, *scale)
    input, bias, down, up = (torch.randn(shape, generator=generator) for shape in
                             ((*tokens, columns), (rows,), (4, columns), (rows, 4)))
    low_rank = LowRank(down, (up,), (Slice(0, rows, 0, 4),)).to(device)
    values = product.linear(input.to(device), weight, bias.to(device), low_rank=low_rank)
    expected = torch.nn.functional.linear(input.double(), dense + up.double() @ down.double(), bias.double())
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-5, atol=1e-3)
    ids = torch.tensor([[3, 0], [19, 3]])
    assert torch.equal(product.embedding(ids.to(device), weight, torch.float32).cpu(), dense.float()[ids])


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
