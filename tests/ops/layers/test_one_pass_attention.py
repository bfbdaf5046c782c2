"""Attention in one pass, the kernel of CPUs: torch's numbers for any shape, mask and dtype."""
import random

import precompiled
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from kernel_cases import cpu_kernels, shared_cache
from pack_api import cpp_backend

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops import kernels
from featherweight.ops.layers import cpu_attention as cpu_attention

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16],
                                      ids=str)
# instructions that are turned off, and how many values are taken at a time
CPUS = {"this CPU": ((), None), "without AMX": (("-mno-amx-bf16",), None),
        "with AVX2": (("-mno-avx512f",), 8)}
# of the layers of models, and others: queries, keys, width of a head
SHAPES = {"SD 1.5": (256, 256, 40), "SD 1.5, text": (256, 77, 80), "SD 1.5, last": (64, 64, 160),
          "SDXL": (256, 256, 64), "Flux": (270, 270, 128), "Wan": (300, 300, 128),
          "VAE": (130, 130, 512), "odd": (97, 613, 41), "wide": (101, 33, 256),
          "one query": (1, 1025, 96), "one key": (5, 1, 3)}


@pytest.fixture(scope="module", params=CPUS)
def one_pass(request, tmp_path_factory):
    """The kernel, compiled for one of `CPUS`, is what computes attention."""
    options, lanes = CPUS[request.param]
    if not cpu_features.is_x86():
        pytest.skip("the kernel is for CPUs with x86's instructions")
    with cpu_kernels(shared_cache(tmp_path_factory)) as patch:
        patch.setattr(cpp_backend, "FLAGS", precompiled.cpu_flags(*options))
        if lanes:
            patch.setattr(cpp_backend, "_max_lanes", lambda: lanes)
        yield


def is_in_one_pass(dtype) -> bool:
    return kernels.find("attention", torch.device("cpu"), None, dtype) is not None


def operands(dtype, tokens, keys, width=24):
    generator = torch.Generator().manual_seed(0)
    return *((2 * torch.randn((2, count, 3 * width), generator=generator)).to(dtype)
             for count in (tokens, keys, keys)), 3


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


# With fewer instructions the same source has fewer lanes: there the odd shapes.
@pytest.mark.parametrize(("one_pass", "shape", "mask"), [
    *(("this CPU", shape, "none") for shape in SHAPES),
    *((name, shape, mask) for name in CPUS for shape in ("odd", "one query")
      for mask in ("none", "causal", "keys", "of each head")
      if mask != "none" or name != "this CPU")], indirect=["one_pass"])
@EVERY_DTYPE
def test_one_pass_is_as_exact_as_torchs(shape, mask, dtype, one_pass):
    assert is_in_one_pass(dtype)
    tokens, keys, width = SHAPES[shape]
    *inputs, heads = operands(dtype, tokens=tokens, keys=keys, width=width)
    addend = {
        "none": None, "causal": torch.ones(tokens, keys).tril(keys - tokens).bool(),
        "keys": torch.arange(keys).expand(2, 1, keys) >= keys // 3,
        "of each head": torch.randn(2, heads, tokens, keys).to(dtype)
    }[mask]
    if mask == "causal":
        addend[:, 0] = True  # torch has no number for a query that sees nothing
    exact = attention_pytorch(
        *(value.double() for value in inputs), heads,
        mask=addend.double() if addend is not None and mask == "of each head" else addend)
    out = cpu_attention.attention(None, *inputs, heads, mask=addend)
    torchs = error(attention_pytorch(*inputs, heads, mask=addend), exact)
    assert out.dtype == dtype and out.shape == exact.shape
    assert error(out, exact) < 1.1 * torchs + 4 * torch.finfo(torch.float32).eps


@EVERY_DTYPE
def test_one_pass_of_random_sizes_is_exact(dtype, one_pass):
    choose = random.Random(1)
    assert is_in_one_pass(dtype)
    for seed in range(16):
        torch.manual_seed(seed)
        batch, key_heads, repeats = (choose.randint(1, 3) for _ in range(3))
        tokens, keys = choose.randint(1, 220), choose.randint(1, 600)
        width, value_width = choose.randint(1, 260), choose.randint(1, 260)
        query = torch.randn(batch, key_heads * repeats, tokens, width).to(dtype)
        key, value = (torch.randn(batch, size, key_heads, keys).to(dtype).permute(0, 2, 3, 1)
                      for size in (width, value_width))  # of strides other than usual
        mask = choose.choice([None, torch.rand(tokens, keys) > 0.3,
                              torch.randn(batch, 1, tokens, keys)])
        out = cpu_attention.attention(None, query, key, value, key_heads * repeats, mask=mask,
                                      skip_reshape=True, skip_output_reshape=True, enable_gqa=True)
        addend = mask.double() if mask is not None and mask.is_floating_point() else mask
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), addend, enable_gqa=True).nan_to_num()
        assert error(out, exact) < 2 * torch.finfo(dtype).eps + 2e-6, (seed, query.shape, key.shape)


def test_one_pass_is_the_same_with_any_number_of_threads(one_pass, monkeypatch):
    *inputs, heads = operands(torch.float32, tokens=301, keys=50, width=72)
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 1)
    expected = cpu_attention.attention(None, *inputs, heads)
    for threads in range(2, 9):
        monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
        assert torch.equal(cpu_attention.attention(None, *inputs, heads), expected), threads


@pytest.mark.parametrize("scale", [0.7, -0.3])
def test_one_pass_takes_a_scale_of_the_models_own(scale, one_pass):
    inputs = operands(torch.float32, 70, 50)
    expected = attention_pytorch(*inputs, scale=scale)
    assert torch.allclose(cpu_attention.attention(None, *inputs, scale=scale), expected, atol=1e-5)


def test_a_query_that_sees_no_key_gets_zeros(one_pass):
    inputs = operands(torch.float32, 70, 50)
    mask = torch.ones(70, 50, dtype=torch.bool)
    mask[3] = False
    out = cpu_attention.attention(None, *inputs, mask=mask)
    assert not out[:, 3].any() and out[:, 4].all()


@EVERY_DTYPE
def test_one_pass_holds_no_scores(dtype, one_pass):
    assert is_in_one_pass(dtype)
    inputs = operands(dtype, tokens=700, keys=700)
    with torch.profiler.profile(profile_memory=True) as profile:
        cpu_attention.attention(None, *inputs)
    assert max(event.cpu_memory_usage for event in profile.events()) <= inputs[0].nbytes
