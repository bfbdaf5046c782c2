"""Dense products on a CPU, by oneDNN and by torch's BLAS."""
import platform

from devtools.measure.weights import random_weight

import pytest
import torch
from pack_api import product

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.cpu_features import is_amd
from featherweight.ops.layers import cpu_linear as cpu_linear
from featherweight.ops.low_rank import LowRank

ROWS, COLUMNS = 96, 256
NEEDS_BFLOAT16 = pytest.mark.skipif(not cpu_features.multiplies_bfloat16(),
                                    reason="oneDNN has no bfloat16 on this CPU")


@pytest.fixture
def onednn(monkeypatch):
    """A CPU whose products oneDNN makes."""
    monkeypatch.setattr(cpu_linear, "takes", lambda input: True)


@pytest.fixture
def cpu_of(monkeypatch):
    """cpu_of(maker, bfloat16): makes the CPU another one."""

    def cpu_of(is_amd, bfloat16, machine="x86_64", kernels="auto"):
        monkeypatch.setenv("FEATHERWEIGHT_KERNELS", kernels)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(cpu_features, "is_amd", lambda: is_amd)
        monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: bfloat16)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(cpu_linear, "_works", lambda dtype: True)
        cpu_linear._dtypes.cache_clear()
        return {dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)
                if cpu_linear.takes(torch.ones(1, 1, dtype=dtype))}

    yield cpu_of
    cpu_linear._dtypes.cache_clear()


def test_the_cpu_decides_and_no_clock(cpu_of):
    assert cpu_of(is_amd=True, bfloat16=True) == {torch.float32, torch.bfloat16}
    assert cpu_of(is_amd=True, bfloat16=False) == {torch.float32}
    assert cpu_of(is_amd=False, bfloat16=True) == {torch.bfloat16}
    assert cpu_of(is_amd=False, bfloat16=False) == set()
    assert cpu_of(is_amd=False, bfloat16=True, machine="aarch64") == set()
    assert cpu_of(is_amd=True, bfloat16=True, kernels="torch") == set()


def test_the_maker_is_known_on_windows(monkeypatch):
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "AMD64 Family 25 Model 97, AuthenticAMD")
    assert is_amd.__wrapped__()


def operands(dtype, tokens, format_name="Q8_0"):
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(format_name, (ROWS, COLUMNS))
    input, bias, down, up = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((tokens, COLUMNS), (ROWS,), (4, COLUMNS), (ROWS, 4)))
    low_rank = LowRank.from_factors([(up.float(), down.float(), (0, ROWS))], ROWS, dtype)
    return input, weight, bias, low_rank


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("slices", [False, True], ids=["whole", "in slices"])
@pytest.mark.parametrize("branch", [False, True], ids=["no LoRA", "LoRA"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [
    torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)], ids=str)
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_product_by_onednn_is_as_exact_as_torchs(tokens, dtype, bias, branch, slices,
                                                   monkeypatch):
    if slices:
        monkeypatch.setattr(product, "CACHED_BYTES", 20 * COLUMNS * dtype.itemsize)
    input, weight, bias_values, low_rank = operands(dtype, tokens)
    bias_values, low_rank = bias_values if bias else None, low_rank if branch else None
    exact = input.double() @ product.dequantize(weight, dtype).double().t()
    if branch:
        exact += (input.double() @ low_rank.down.double().t()) @ low_rank.ups[0].double().t()
    if bias:
        exact += bias_values.double()
    with torch.inference_mode():
        errors = []
        for takes in (cpu_linear.takes, lambda input: False):
            monkeypatch.setattr(cpu_linear, "takes", takes)
            out = product.linear(input, weight, bias_values, low_rank)
            errors.append((out - exact).norm() / exact.norm())
    # of few rows oneDNN may sum in another order, which is some units in the last place of float32
    assert errors[0] < 1.1 * errors[1] + 3e-7


@pytest.mark.usefixtures("onednn")
def test_an_input_without_rows_has_an_output_without_rows(monkeypatch):
    monkeypatch.undo()
    _, weight, bias, _ = operands(torch.float32, 1)
    assert product.linear(torch.ones(0, COLUMNS), weight, bias).shape == (0, ROWS)
