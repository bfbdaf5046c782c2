"""Products in whole numbers: what the codes are, how far the product is from the exact one, and
where the exact one runs."""
from devtools.measure.weights import snr

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from pack_api import (
    FORMATS,
    packed_operations,
    packed_tensor,
    packed_tensors,
    product,
    random_tensors,
)
from patched_layers import with_patches
from user_kernels import forget_decisions

from featherweight.ops import kernels
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.formats.column_groups import ColumnGroups
from featherweight.ops.kernels import int8_codes
from featherweight.ops.layers import fast_on_cpu, workspace

CPU = torch.device("cpu")
TOKENS, COLUMNS, ROWS = 80, 1024, 48
PACKED = {name: FORMATS[name] for name in ("Q8_0", "Q4_K")} | {
    "INT8": INT8.of_columns(COLUMNS),
    "NF4 with blocks across rows": FORMATS["NF4"].of_block_length(4096),
    "Q4_K in another order": ColumnGroups.of(FORMATS["Q4_K"], COLUMNS, 4, 8),
}
needs_vnni = pytest.mark.skipif(not fast_on_cpu.multiplies_integers(CPU),
                                reason="the CPU has no units for int8")


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    """Without a kernel too. The codes here are torch's; kernels have tests of their own."""
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    forget_decisions(monkeypatch)
    monkeypatch.setattr(fast_on_cpu, "MIN_TOKENS", TOKENS)
    monkeypatch.setattr(fast_on_cpu, "MIN_TOKENS_WITHOUT_KERNEL", TOKENS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(name="Q8_0", rows=ROWS, columns=COLUMNS):
    """A packed weight of random blocks of one format."""
    base = getattr(PACKED[name], "base", PACKED[name])
    data, *scale = random_tensors(base, rows * columns // base.block_length, CPU, bounded=True)
    return packed_tensor(PACKED[name], data, (rows, columns), torch.float32, *scale)


def normal_weight(rows=512, columns=3072):
    """A weight of bitsandbytes' int8 with the values of a normal distribution, which it holds
    almost exactly."""
    values = normal(rows, columns, seed=1)
    scale = values.abs().amax(-1) / 127
    codes = (values / scale.unsqueeze(-1)).round().to(torch.int8)
    return packed_tensor(INT8.of_columns(columns), codes.view(torch.uint8), (rows, columns),
                         torch.float32, scale)


def encoded_rows(weight):
    """Codes and scales of a weight's rows."""
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    int8_codes.encode_rows(weight.params.format, packed_tensors(weight), codes, scales, 0)
    return codes, scales


def with_outliers(tokens=256, columns=3072):
    input = normal(tokens, columns)
    input[:, 7::columns // 8] *= 50
    return input


def layer_of(weight, compute="int8", bias=None, dtype=torch.float32):
    rows, columns = weight.shape
    layer = packed_operations(compute=compute).Linear(columns, rows, bias=bias is not None,
                                                      dtype=dtype)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


# --- the codes ---


def test_the_rotation_is_orthogonal():
    rotation = int8_codes.rotate(torch.eye(256))
    assert torch.equal(rotation @ rotation.t(), torch.eye(256))


@pytest.mark.parametrize(
    "values",
    [torch.eye(256)[37:38], torch.ones(1, 256), 1 - 2 * (torch.arange(256) % 2).float()[None]],
    ids=["one value", "the same values", "alternating values"],
)
def test_the_rotation_spreads_evenly(values):
    assert len(int8_codes.rotate(values).abs().unique()) == 1


def test_groups_of_columns_are_rotated_apart():
    values = normal(3, 512)
    parts = [int8_codes.rotate(part.contiguous()) for part in values.split(256, 1)]
    assert torch.allclose(int8_codes.rotate(values), torch.cat(parts, 1), atol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_rows_of_a_weight_are_coded_to_half_a_step(name):
    weight = weight_of(name)
    codes, scales = encoded_rows(weight)
    rows = int8_codes.rotate(weight.dequantize())
    assert torch.allclose(scales, rows.abs().amax(1) / 127, rtol=1e-5)
    assert (codes - rows / scales[:, None]).abs().max() <= 0.5 + 1e-2
    assert (codes.abs().amax(1) == 127).all()


def test_rows_are_coded_from_any_block_on_and_in_chunks(monkeypatch):
    weight = weight_of("Q4_K")
    (codes, _), part = encoded_rows(weight), torch.empty(ROWS - 5, COLUMNS, dtype=torch.int8)
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES", 3 * COLUMNS)
    int8_codes.encode_rows(PACKED["Q4_K"], packed_tensors(weight), part, torch.empty(ROWS - 5),
                           5 * COLUMNS // 256)
    assert torch.equal(part, codes[5:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_have_no_scale(value):
    values, scales = torch.tensor([[1.0, value], [1.0, 2.0]]), torch.empty(2)
    int8_codes.quantize_into(values, torch.empty((2, 2), dtype=torch.int8), scales)
    assert scales.isnan().tolist() == [True, False]


# --- the product ---


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_the_product_is_that_of_the_codes(name, dtype):
    weight, bias = weight_of(name), normal(ROWS, seed=2, dtype=dtype)
    input = normal(TOKENS, COLUMNS, dtype=dtype) / 64  # sums stay within float16
    codes, scales = fast_on_cpu._encode_tokens(input)
    weight_codes, weight_scales = encoded_rows(weight)
    exact = codes.double() @ weight_codes.double().t()
    exact *= scales.double()[:, None] * weight_scales.double()
    for addend in (None, bias):
        expected = exact + (0 if addend is None else addend.double())
        got = product.linear(input, weight, addend, fast=True)
        assert got.dtype == dtype
        rounding = torch.finfo(dtype)
        allowed = rounding.eps * (exact.abs() + expected.abs() + rounding.tiny)
        assert ((got.double() - expected).abs() <= allowed).all()


@needs_vnni
def test_a_large_weight_goes_through_the_product_in_slices(monkeypatch):
    weight, input = weight_of("NF4 with blocks across rows"), normal(2, TOKENS // 2, COLUMNS)
    whole = product.linear(input, weight, normal(ROWS, seed=2), fast=True)
    assert whole.shape == (2, TOKENS // 2, ROWS)
    taken = []
    take = workspace.Workspace.take
    monkeypatch.setattr(workspace.Workspace, "take",
                        lambda self, shape, dtype: taken.append(shape) or take(self, shape, dtype))
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 20 * (COLUMNS + 8 * TOKENS))
    assert torch.equal(product.linear(input, weight, normal(ROWS, seed=2), fast=True), whole)
    assert taken == [(16, COLUMNS)] * 3


@needs_vnni
def test_the_error_is_that_of_eight_bits():
    weight, input = normal_weight(), normal(256, 3072)
    assert snr(product.linear(input, weight, fast=True), product.linear(input, weight)) > 38


@needs_vnni
@pytest.mark.parametrize(
    "input",
    [with_outliers(), torch.nn.functional.gelu(normal(256, 3072)), normal(256, 3072) + 3],
    ids=["outliers", "gelu", "mean"],
)
def test_the_error_is_no_larger_where_columns_are(input):
    weight = normal_weight()
    assert snr(product.linear(input, weight, fast=True), product.linear(input, weight)) > 37.5


@needs_vnni
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_changes(value):
    weight, input = weight_of(), normal(TOKENS, COLUMNS)
    expected = product.linear(input, weight, fast=True)
    input[3, 500] = value
    got = product.linear(input, weight, fast=True)
    assert got[3].isnan().all()
    assert torch.equal(got[4:], expected[4:]) and torch.equal(got[:3], expected[:3])


@needs_vnni
def test_rows_of_zeros_give_the_bias():
    input, bias = normal(TOKENS, COLUMNS), normal(ROWS, seed=2)
    input[3] = 0
    assert torch.equal(product.linear(input, weight_of(), bias, fast=True)[3], bias)


# --- LoRA ---


@needs_vnni
# at the second, the exact product merges the LoRA into the dequantised weight
@pytest.mark.parametrize("tokens", [TOKENS, 4096])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_has_its_exact_effect_at_any_strength_and_token_count(tokens, strength):
    layer, input = layer_of(normal_weight(ROWS, COLUMNS)), normal(tokens, COLUMNS)
    up, down = normal(ROWS, 4, seed=5) * 0.02, normal(4, COLUMNS, seed=6) * COLUMNS ** -0.5
    value, without = LoRAAdapter(set(), (up, down, None, None, None, None)), layer(input)
    with_patches(layer, [(strength, value, 1.0, None, None)])
    effect = strength * input @ (up @ down).t()
    assert (layer(input) - without - effect).norm() < 1e-4 * effect.norm()


# --- where it runs ---


@pytest.mark.parametrize("case", [
    "columns", "rows", "tokens", "tokens without a kernel", "device", "gradient", "weight patch",
    "exact"])
def test_elsewhere_the_product_is_exact(case, monkeypatch):
    rows, columns, tokens = ROWS, COLUMNS, TOKENS
    if case == "columns":
        columns -= 32
    elif case == "rows":
        rows -= 4
    elif case == "tokens":
        tokens -= 1
    elif case == "tokens without a kernel":
        monkeypatch.setattr(fast_on_cpu, "MIN_TOKENS_WITHOUT_KERNEL", TOKENS + 1)
    elif case == "device":
        monkeypatch.setattr(fast_on_cpu, "multiplies_integers", lambda device: False)
    weight, bias = weight_of("Q8_0", rows, columns), normal(rows, seed=2)
    input = normal(tokens, columns).requires_grad_(case == "gradient")
    exact, layer = (layer_of(weight, compute, bias)
                    for compute in ("exact", "exact" if case == "exact" else "int8"))
    if case == "weight patch":
        for each in (exact, layer):
            with_patches(each, [(1.0, (normal(rows, columns, seed=3),), 1.0, None, None)])
    assert torch.equal(layer(input), exact(input))


@needs_vnni
def test_only_linear_layers_asked_for_it_multiply_in_whole_numbers():
    weight, input = weight_of(), normal(TOKENS, COLUMNS)
    exact = layer_of(weight, "exact")(input)
    assert not torch.equal(layer_of(weight)(input), exact)
    assert torch.equal(layer_of(weight, "exact")(input), exact)
    experts = packed_operations(compute="int8").MoEExperts(
        1, COLUMNS, ROWS, bias=False, dtype=torch.float32
    )
    experts.load_state_dict(
        {"weight": packed_tensor(PACKED["Q8_0"], weight._qdata, (1, ROWS, COLUMNS))})
    assert torch.equal(experts.expert_linear(input, 0), exact)


def test_a_device_whose_sums_leave_int16_does_not_multiply_integers(monkeypatch):
    multiply = torch._int_mm

    def saturating(a, b):
        return multiply(a, b).clamp(-(1 << 15), (1 << 15) - 1)

    fast_on_cpu.multiplies_integers.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not fast_on_cpu.multiplies_integers(CPU)
    monkeypatch.undo()
    fast_on_cpu.multiplies_integers.cache_clear()


@needs_vnni
def test_compiled_fullgraph_agrees_with_eager_for_few_tokens_and_many():
    layer = layer_of(weight_of("Q4_K"), bias=normal(ROWS, seed=2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (3, TOKENS):
            assert torch.equal(compiled(normal(tokens, COLUMNS)), layer(normal(tokens, COLUMNS)))


@needs_vnni
def test_the_operator_has_a_right_fake():
    weight = weight_of()
    arguments = (normal(2, TOKENS, COLUMNS), packed_tensors(weight), None, "Q8_0", ROWS, None, [],
                 [], True)
    torch.library.opcheck(torch.ops.featherweight.linear.default, arguments,
                          test_utils=("test_schema", "test_faketensor"))
