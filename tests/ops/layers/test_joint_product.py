"""A product and its LoRAs as one on GPUs: what it computes, where it is taken, and the bytes that
it moves."""
import contextlib
import random

from devtools.measure.step_traffic import Traffic
from devtools.measure.weights import random_weight

import pytest
import torch
from lora_gain import assert_full_strength
from pack_api import FORMATS, packed_tensors, product
from torch_kernels import unchecked_kernels

from featherweight.ops import kernels
from featherweight.ops.layers import joint_product, workspace
from featherweight.ops.low_rank import LowRank
from featherweight.ops.tensor.packed_layout import pack_16bit
from featherweight.ops.tensor.packed_tensor import relabel

pytestmark = pytest.mark.fake_gpus(devices=1)
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What new memory holds is NaN, as in memory that was used before."""
    unchecked_kernels(monkeypatch, "cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(name, rows, columns, dtype):
    weight = (pack_16bit(torch.randn(rows, columns), dtype) if name == "plain"
              else relabel(random_weight(name, (rows, columns)), dtype=dtype))
    return weight.to(GPU)


def low_rank_of(draw, rows, columns, dtype, count=2, whole=False):
    """Several LoRAs, some of them on a part of the rows."""
    factors = []
    for _ in range(count):
        first, end = (0, rows) if whole else sorted(draw.sample(range(rows + 1), 2))
        rank = draw.randint(1, columns // 20)
        factors.append((torch.randn(end - first, rank), torch.randn(rank, columns) / columns**0.5,
                        (first, end)))
    return LowRank.from_factors(factors, rows, dtype).to(GPU)


def both_ways(monkeypatch, input, weight, bias, low_rank):
    """Returns the product apart and joined."""
    monkeypatch.setattr(joint_product, "is_smaller", lambda *args: False)
    apart = product.linear(input, weight, bias, low_rank)
    monkeypatch.setattr(joint_product, "is_smaller", lambda *args: True)
    return apart, product.linear(input, weight, bias, low_rank)


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_it_is_the_product_and_the_branch_rounded_once(seed, monkeypatch):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    rows, columns = draw.randint(1, 90) * 8, draw.choice((256, 512, 768))
    tokens = draw.randint(17, 300)
    weight = weight_of(draw.choice(("Q4_K", "Q8_0", "NF4", "INT8_ROWS", "plain")), rows, columns,
                       dtype)
    input = torch.randn(2, tokens, columns, device=GPU).to(dtype)
    bias = draw.choice((None, torch.randn(rows, device=GPU).to(dtype)))
    low_rank = low_rank_of(draw, rows, columns, dtype, draw.randint(1, 3), draw.random() < 0.5)
    row_bytes = columns * dtype.itemsize
    in_part = draw.choice(("whole", "rows", "tokens"))
    if in_part == "rows":
        monkeypatch.setattr(workspace, "DEVICE_WORKSPACE_BYTES", row_bytes * rows // 3)
    elif in_part == "tokens":
        monkeypatch.setattr(joint_product, "INPUT_BYTES", row_bytes * tokens // 3)
    dense = product.dequantize(weight, dtype).double()
    for part, up in low_rank.parts():
        down = low_rank.down[part.rank:part.rank_end]
        dense[part.row:part.row_end] += up.double() @ down.double()
    exact = torch.nn.functional.linear(input.double(), dense,
                                       None if bias is None else bias.double())
    apart, joined = both_ways(monkeypatch, input, weight, bias, low_rank)
    error, error_apart = ((out.double() - exact).norm() / exact.norm() for out in (joined, apart))
    assert error < 4 * torch.finfo(dtype).eps and error < 1.1 * error_apart


@pytest.mark.parametrize("name", ["Q4_K", "plain"])
@torch.no_grad()
def test_loras_of_any_strength_have_their_whole_effect(name, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(joint_product, "is_smaller", lambda *args: True)
    rows, columns, rank = 512, 256, 16
    weight = weight_of(name, rows, columns, torch.bfloat16)
    up, down = torch.randn(rows, rank), torch.randn(rank, columns)

    def branch(strength):
        return LowRank.from_factors([(up * strength, down, (0, rows))], rows, torch.bfloat16)

    def change(strength):
        low_rank = branch(strength)
        return low_rank.ups[0].float() @ low_rank.down.float()

    base = product.dequantize(weight, torch.float32).norm().item() / (up @ down).norm().item()
    inputs = [torch.randn(1 << 13, columns).bfloat16() for _ in range(2)]
    assert_full_strength(
        lambda input, strength: product.linear(input.to(GPU), weight, None,
                                               branch(strength).to(GPU)).cpu(),
        inputs, change, (0.001, 0.01, 0.3), base)


def traffic(monkeypatch, tokens, rows, columns, rank, has_bias, name, way):
    """Returns what a layer's product moves, by "apart", "joined" or its own choice."""
    dtype = torch.bfloat16
    weight, input = weight_of(name, rows, columns, dtype), torch.zeros(tokens, columns, device=GPU,
                                                                       dtype=dtype)
    low_rank = LowRank.from_factors(
        [(torch.randn(rows, rank), torch.randn(rank, columns), (0, rows))], rows, dtype).to(GPU)
    bias = torch.zeros(rows, device=GPU, dtype=dtype) if has_bias else None
    kernels.decide(GPU, [("dequantize", weight.params.format, dtype)])
    with monkeypatch.context() as changed, contextlib.ExitStack() as counting:
        if way != "chosen":
            changed.setattr(joint_product, "is_smaller", lambda *args: way == "joined")
        counts = Traffic()

        def dequantize_into(packed_format, tensors, out, first=0):
            counts.add(out, *([out] if name == "plain" else []))
            return out

        changed.setattr(kernels, "dequantize_into", dequantize_into)
        counting.enter_context(counts)
        product._by_torch(input, weight.params.format, packed_tensors(weight), rows, bias, low_rank)
    return counts


@pytest.mark.parametrize("name", ["Q4_K", "plain"])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_the_way_that_moves_fewer_bytes_is_taken(name, has_bias, monkeypatch):
    draw = random.Random(f"{name} {has_bias}")
    taken = set()
    for _ in range(16):
        rows, columns = draw.choice((128, 256, 512, 1024)), draw.choice((256, 512))
        shape = (draw.randint(17, 1500), rows, columns, 8 * draw.randint(1, 4), has_bias, name)
        apart, joined, chosen = (traffic(monkeypatch, *shape, way)
                                 for way in ("apart", "joined", "chosen"))
        weight_bytes = rows * columns * 2
        # reading the product's operands is in all
        assert chosen.nbytes <= min(apart.nbytes, joined.nbytes) + 0.02 * weight_bytes, shape
        taken.add(chosen.nbytes == joined.nbytes)
        if chosen.nbytes == joined.nbytes and has_bias and name != "plain":
            assert chosen.launches <= apart.launches
    assert taken == {False, True}


def fits(tokens=4608, rows=3072, columns=3072, rank=32, device=GPU, dtype=torch.bfloat16):
    low_rank = LowRank(torch.empty(rank, columns, device="meta"), (), ())
    input = torch.empty(tokens, columns, device=device, dtype=dtype)
    return joint_product.is_smaller(input, FORMATS["Q4_K"], rows, True, low_rank)


def test_elsewhere_the_branch_stays_apart(monkeypatch):
    assert fits() and not fits(device="cpu") and not fits(tokens=17)
    assert not fits(rank=3072 // 4 + 1) and not fits(rows=1024) and not fits(columns=3076)
    monkeypatch.setattr(workspace, "DEVICE_WORKSPACE_BYTES", 1 << 24)
    assert fits() and not fits(tokens=20_000)
    monkeypatch.setenv("FEATHERWEIGHT_LORA", "apart")
    joint_product.is_off.cache_clear()
    assert not fits()
    joint_product.is_off.cache_clear()
