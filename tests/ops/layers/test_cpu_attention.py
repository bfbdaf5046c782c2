"""Attention on a CPU without a kernel: the host's numbers, in slices."""
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad

from featherweight.ops.layers import cpu_attention as cpu_attention
from featherweight.ops.layers import cpu_linear as cpu_linear


def operands(dtype, batch=2, heads=3, tokens=70, keys=50, width=24, reshaped=False):
    generator = torch.Generator().manual_seed(0)

    def random(count):
        shape = (batch, heads, count, width) if reshaped else (batch, count, heads * width)
        return (2 * torch.randn(shape, generator=generator)).to(dtype)

    return random(tokens), random(keys), random(keys), heads


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def errors(dtype, other_attention, reshaped, skip_output_reshape) -> tuple[float, float]:
    """The errors of our attention and of another one of the host's."""
    *inputs, heads = operands(dtype, reshaped=reshaped)
    shapes = {"skip_reshape": reshaped, "skip_output_reshape": skip_output_reshape}
    exact = attention_pytorch(*(value.double() for value in inputs), heads, **shapes)
    other = other_attention(*inputs, heads, **shapes)
    out = cpu_attention.attention(None, *inputs, heads, **shapes)
    assert out.dtype == dtype and out.shape == exact.shape
    return error(out, exact), error(other, exact)


# bytes of scores, so that a slice is a part of a head, one head, several, or all
@pytest.mark.parametrize("slice_bytes", [1, 1000, 70 * 50 * 2, 2 * 70 * 50 * 2, 1 << 22])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("reshaped", [False, True])
def test_slices_of_any_size_are_as_exact_as_the_hosts_own(slice_bytes, reshaped,
                                                          skip_output_reshape, monkeypatch):
    monkeypatch.setattr(cpu_attention, "SLICE_BYTES", slice_bytes)
    ours, hosts = errors(torch.bfloat16, attention_sub_quad, reshaped, skip_output_reshape)
    assert ours < 1.1 * hosts


def test_a_scale_of_the_models_own_is_used():
    inputs = operands(torch.bfloat16)
    exact = attention_pytorch(*(value.double() for value in inputs[:3]), inputs[3], scale=0.7)
    assert error(cpu_attention.attention(None, *inputs, scale=0.7), exact) < 0.02


@pytest.mark.parametrize("slice_bytes", [1, 1000, 1 << 22])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("reshaped", [False, True])
def test_slices_by_onednn_are_as_exact_as_torchs(slice_bytes, reshaped, skip_output_reshape,
                                                 monkeypatch):
    monkeypatch.setattr(cpu_attention, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(cpu_linear, "takes", lambda input: True)
    ours, torchs = errors(torch.float32, attention_pytorch, reshaped, skip_output_reshape)
    assert ours < 2 * torchs


def test_float32_is_torchs_own_attention_elsewhere(monkeypatch):
    monkeypatch.setattr(cpu_linear, "takes", lambda input: False)
    inputs = operands(torch.float32)
    assert torch.equal(cpu_attention.attention(None, *inputs), attention_pytorch(*inputs))


@pytest.mark.parametrize("options", [
    {"mask": torch.zeros(70, 50, dtype=torch.bfloat16)}, {"attn_precision": torch.float32},
    {"enable_gqa": True}], ids=lambda options: next(iter(options)))
def test_what_is_not_for_slices_is_the_hosts(options):
    calls = []
    cpu_attention.attention(lambda *inputs, **given: calls.append(given),
                            *operands(torch.bfloat16), **options)
    (given,) = calls
    assert given.items() >= options.items()


@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(70, 0), (0, 50), (0, 0)])
def test_attention_without_keys_or_queries_is_the_hosts(tokens, keys, dtype, reshaped,
                                                        monkeypatch):
    monkeypatch.setattr(cpu_linear, "takes", lambda input: input.numel() > 0)
    inputs = operands(dtype, tokens=tokens, keys=keys, reshaped=reshaped)
    expected = attention_pytorch(*inputs, skip_reshape=reshaped)
    out = cpu_attention.attention(attention_pytorch, *inputs, skip_reshape=reshaped)
    assert torch.equal(out, expected) and not out.any()


def test_no_more_scores_than_a_slice_are_held(monkeypatch):
    monkeypatch.setattr(cpu_attention, "SLICE_BYTES", 1000)
    inputs = operands(torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        cpu_attention.attention(None, *inputs)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * inputs[0].nbytes  # the operands and the result; all scores are 42 000


@pytest.mark.parametrize("needs_gradient", [0, 1, 2], ids=["query", "key", "value"])
def test_a_gradient_of_any_input_is_computed(needs_gradient):
    inputs = operands(torch.bfloat16)
    inputs[needs_gradient].requires_grad_()
    cpu_attention.attention(attention_pytorch, *inputs).sum().backward()
    assert inputs[needs_gradient].grad.isfinite().all()
