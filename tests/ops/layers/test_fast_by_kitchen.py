"""SVDQuant and AWQ products by comfy_kitchen's functions, on a CPU by its eager backend."""
import random
import types
from unittest import mock

import pytest
import torch
from comfy_kitchen.constraints import FunctionConstraints
from comfy_kitchen.registry import BackendRegistry, registry
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from lora_gain import Gain
from pack_api import (
    FORMATS,
    join_packed,
    pack_tensor,
    packed_operations,
    packed_tensor,
    packed_tensors,
    product,
    random_tensors,
    relabel,
    with_low_rank,
)

from featherweight.loaders.quantizers.comfy_quant import pack_parts, shifted_bias
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels import int8_codes
from featherweight.ops.layers import fast_by_kitchen, int8_epilogue
from featherweight.ops.layers.rounded_sum import add_small
from featherweight.ops.low_rank import LowRank

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
SVDQUANT, AWQ = "TensorCoreSVDQuantW4A4Layout", "TensorCoreAWQW4A16Layout"
TOLERANCE = 2e-2  # of 16 bits, of the largest number of a result; comfy_kitchen's tests have 8e-3


@pytest.fixture
def forced(monkeypatch):
    """Has comfy_kitchen's reference compute on a CPU what its kernels compute on a GPU."""
    monkeypatch.setattr(fast_by_kitchen, "BACKENDS", ("eager",))


def svdquant_parts(draw, dtype):
    """What a file of random sizes has of a layer, and its settings."""
    rows, columns, rank = 8 * draw.randint(1, 40), 64 * draw.randint(1, 9), draw.randint(1, 40)
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    parts = {
        "weight": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8,
                                generator=generator),
        "weight_scale": (normal(columns // 64, rows).abs() * 0.01 + 0.001).to(dtype),
        "smooth_factor": (normal(columns).abs() + 0.2).to(dtype),
        "proj_down": (normal(columns, rank) / columns**0.5).to(dtype),
        "proj_up": (normal(rows, rank) * 0.3).to(dtype)}
    return ({"format": "svdquant_w4a4", "act_unsigned": draw.random() < 0.5}, parts,
            normal(rows).to(dtype), generator)


def of_kitchen(settings, parts, down=None, up=None):
    """The weight as comfy_kitchen has it, with the factors of LoRAs in its low rank."""
    downs = [parts["proj_down"]] + ([] if down is None else [down.t()])
    ups = [parts["proj_up"]] + ([] if up is None else [up])
    params = get_layout_class(SVDQUANT).Params(
        scale=parts["weight_scale"], orig_dtype=parts["weight_scale"].dtype,
        orig_shape=(len(parts["weight"]), parts["weight"].shape[1] * 2),
        proj_down=torch.cat(downs, 1), proj_up=torch.cat(ups, 1),
        smooth_factor=parts["smooth_factor"], act_unsigned=settings["act_unsigned"])
    return QuantizedTensor(parts["weight"], SVDQUANT, params)


def assert_close(out, expected):
    out, expected = out.float(), expected.float()
    assert out.shape == expected.shape and expected.isfinite().all()
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (out - expected).norm() <= 6e-3 * expected.norm()


def without_comfy_kitchen(*operands) -> torch.Tensor:
    """The fast product of this pack."""
    with mock.patch.object(fast_by_kitchen, "BACKENDS", ()):
        return product.linear(*operands, fast=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_svdquant_of_random_sizes_is_what_comfy_kitchen_computes(dtype, seed, forced):
    draw = random.Random(f"{dtype} {seed}")
    settings, parts, bias, generator = svdquant_parts(draw, dtype)
    weight = relabel(pack_parts(settings, parts), dtype=dtype)
    rows, columns = weight.shape
    input = torch.randn(2, draw.randint(9, 200), columns, generator=generator).to(dtype)
    if settings["act_unsigned"]:
        input = torch.nn.functional.gelu(input)
    held = shifted_bias(weight, bias).to(dtype)
    expected = torch.nn.functional.linear(input, of_kitchen(settings, parts), bias)
    out = product.linear(input, weight, held, fast=True)
    assert_close(out, expected)
    assert settings["act_unsigned"] or torch.equal(out, expected)
    exact = product.linear(input, weight, held)  # which quantises no input
    assert (out - exact).norm() > 0.02 * exact.norm()
    # two LoRAs, one of them on some of the rows
    first, rank = draw.randrange(rows), draw.randint(1, 9)
    up, down = torch.randn(rows, rank), torch.randn(rank, columns) / columns**0.5
    part_up, part_down = torch.randn(rows - first, 3), torch.randn(3, columns) / columns**0.5
    low_rank = LowRank.from_factors(
        [(up, down, (0, rows)), (part_up, part_down, (first, rows))], rows, dtype)
    whole_up = torch.cat([up, torch.nn.functional.pad(part_up, (0, 0, first, 0))], 1).to(dtype)
    expected = torch.nn.functional.linear(
        input, of_kitchen(settings, parts, torch.cat([down, part_down]).to(dtype), whole_up), bias)
    assert_close(product.linear(input, weight, held, low_rank, fast=True), expected)


@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize("format_name", ["Q8_0", "Q4_K", "IQ4_XS", "NF4"])
@pytest.mark.parametrize("nbytes", [256 * 512, 1 << 28], ids=["in slices of rows", "whole"])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_other_weights_are_encoded_in_int8_for_comfy_kitchens_product(
        has_kernel, nbytes, format_name, has_branch, forced, monkeypatch):
    encoded = int8_kernel(monkeypatch) if has_kernel else [()]
    dtype, rows, columns = torch.bfloat16, 520, 512
    weight = relabel(pack_tensor(torch.randn(rows, columns), FORMATS[format_name]), dtype=dtype)
    input = torch.randn(600, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    low_rank = LowRank.from_factors(
        [(torch.randn(rows, 4), torch.randn(4, columns) / columns**0.5, (0, rows))], rows, dtype
    ) if has_branch else None
    exact = product.linear(input, weight, bias, low_rank)
    monkeypatch.setattr(fast_by_kitchen.workspace, "workspace_bytes", lambda device: nbytes)
    out = product.linear(input, weight, bias, low_rank, fast=True)
    error = (out - exact).float().norm() / exact.float().norm()
    assert 0.002 < error < 0.02 and encoded
    few = input[:fast_by_kitchen.MIN_INT8_TOKENS - 1]
    assert torch.equal(product.linear(few, weight, bias, low_rank, fast=True),
                       without_comfy_kitchen(few, weight, bias, low_rank))
    if has_branch:  # LoRAs keep their full effect
        gained = out.float() - product.linear(input, weight, bias, fast=True).float()
        expected = low_rank.product(input, rows).float()
        assert 0.99 < (gained * expected).sum() / expected.square().sum() < 1.01


def int8_kernel(monkeypatch) -> list:
    """Has a kernel encode weights, as one that a GPU may have. Returns the shapes of its codes."""
    find, shapes = fast_by_kitchen.kernels.find, []

    def encode(packed_format, tensors, codes, *rest):
        shapes.append(codes.shape)
        int8_codes.encode_rows(packed_format, tensors, codes, *rest)

    monkeypatch.setattr(fast_by_kitchen.kernels, "find", lambda capability, *rest: (
        encode if capability == "int8_rows" else find(capability, *rest)))
    return shapes


WAYS = {"before it rounds": lambda sums, change, dtype: (sums + change).to(dtype),
        "after it has rounded": lambda sums, change, dtype: sums.to(dtype) + change.to(dtype),
        "a tenth less": lambda sums, change, dtype: (sums + 0.9 * change).to(dtype),
        "of rows by the scale of others": lambda sums, change, dtype: (
            sums + change.roll(1, 1)).to(dtype)}


@pytest.mark.parametrize("capability", [(8, 6), (7, 5)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_comfy_kitchen_adds_loras_only_where_it_does_so_before_it_rounds(way, dtype, capability,
                                                                          monkeypatch):
    quantize, multiply = (registry.get_implementation(function, backend="eager")
                          for function in fast_by_kitchen.PRODUCTS["int8"].functions)
    given = []

    def int8_linear(x, weight, weight_scale, bias=None, out_dtype=None, convrot=False,
                    convrot_groupsize=256, residual=None, residual_scale=None):
        sums = multiply(x, weight, weight_scale, bias, torch.float32, convrot, convrot_groupsize)
        if residual is None:
            return sums.to(out_dtype)
        given.append(residual)
        return WAYS[way](sums, residual_scale.float() * residual, out_dtype)

    monkeypatch.setattr(fast_by_kitchen, "_functions", lambda *_: (quantize, int8_linear))
    monkeypatch.setattr(fast_by_kitchen, "_backend", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(int8_epilogue, "_verdicts", {})
    rows, columns = 8 * random.randint(20, 60), 256 * random.randint(1, 3)
    weight = relabel(pack_tensor(torch.randn(rows, columns), FORMATS["Q8_0"]), dtype=dtype)
    input = torch.randn(random.randint(512, 700), columns).to(dtype)
    strength = 2.0 ** random.uniform(-12, 0)
    low_rank = LowRank.from_factors([(
        strength * torch.randn(rows, 4), torch.randn(4, columns), (0, rows))], rows, dtype)
    plain = product.linear(input, weight, None, fast=True)
    out = product.linear(input, weight, None, low_rank, fast=True)
    change, is_used = low_rank.product(input, rows), way == "before it rounds"
    if capability < (8, 0):
        assert not given
    else:
        assert len(given) == 1 + is_used and torch.equal(given[-1], change) == is_used
    if capability < (8, 0) or not is_used:
        assert torch.equal(out, add_small(plain, change))
    given.clear()
    assert torch.equal(out, product.linear(input, weight, None, low_rank, fast=True))
    assert len(given) == (is_used and capability >= (8, 0))  # tried once


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_a_joined_weight_have_smoothing_and_shift_of_their_own(axis, forced):
    draw, dtype = random.Random(axis), torch.bfloat16
    layers = [svdquant_parts(draw, dtype)[:3] for _ in range(2)]
    cut = [min(sizes) for sizes in zip(*(parts["weight"].shape for _, parts, _ in layers))]
    for (settings, parts, _), is_unsigned in zip(layers, (False, True)):
        settings["act_unsigned"] = is_unsigned
        if axis == 0:  # the same columns, or the same rows
            count = cut[1] * 2
            parts |= {"weight": parts["weight"][:, :cut[1]].contiguous(),
                      "weight_scale": parts["weight_scale"][:count // 64].contiguous(),
                      "smooth_factor": parts["smooth_factor"][:count],
                      "proj_down": parts["proj_down"][:count]}
        else:
            parts |= {name: parts[name][:cut[0]] for name in ("weight", "proj_up")}
            parts["weight_scale"] = parts["weight_scale"][:, :cut[0]].contiguous()
    weights = [pack_parts(settings, parts) for settings, parts, _ in layers]
    whole = relabel(join_packed(weights, axis), dtype=dtype)
    rows, columns = whole.shape
    input = torch.nn.functional.gelu(torch.randn(40, columns)).to(dtype)
    sizes = [weight.shape[axis] for weight in weights]
    biases = [bias[:len(weight)] for (_, _, bias), weight in zip(layers, weights)]
    up, down = torch.randn(rows, 5), torch.randn(5, columns) / columns**0.5
    low_rank = LowRank.from_factors([(up, down, (0, rows))], rows, dtype)
    ups, downs = ((up.split(sizes), [down] * 2) if axis == 0 else
                  ([up] * 2, down.split(sizes, 1)))
    inputs = [input] * 2 if axis == 0 else input.split(sizes, 1)
    expected = [torch.nn.functional.linear(
        part_input, of_kitchen(settings, parts, part_down.to(dtype), part_up.to(dtype)), bias)
        for part_input, (settings, parts, _), part_down, part_up, bias in zip(
            inputs, layers, downs, ups, biases)]
    held = [shifted_bias(weight, bias).float() for weight, bias in zip(weights, biases)]
    bias = torch.cat(held) if axis == 0 else held[0] + held[1]
    out = product.linear(input, whole, bias.to(dtype), low_rank, fast=True)
    assert_close(out, torch.cat(expected, 1) if axis == 0 else expected[0] + expected[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_awq_of_random_sizes_is_what_comfy_kitchen_computes(dtype, seed, forced):
    draw = random.Random(f"awq {dtype} {seed}")
    rows, columns, group = 8 * draw.randint(1, 40), 256 * draw.randint(1, 4), draw.choice((64, 128))
    torch.manual_seed(seed)
    parts = {"weight": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8),
             "weight_scale": (torch.rand(columns // group, rows) * 0.01 + 0.001).to(dtype),
             "weight_zeros": (torch.randn(columns // group, rows) * 0.01).to(dtype)}
    weight = pack_parts({"format": "awq_w4a16", "group_size": group}, parts)
    params = get_layout_class(AWQ).Params(
        scale=parts["weight_scale"], zeros=parts["weight_zeros"], orig_dtype=dtype,
        orig_shape=(rows, columns), group_size=group)
    input, bias = torch.randn(draw.randint(1, 9), columns).to(dtype), torch.randn(rows).to(dtype)
    expected = torch.nn.functional.linear(
        input, QuantizedTensor(parts["weight"], AWQ, params), bias)
    assert torch.equal(product.linear(input, weight, bias, fast=True), expected)
    up, down = torch.randn(rows, 5), torch.randn(5, columns) / columns**0.5
    low_rank = LowRank.from_factors([(up, down, (0, rows))], rows, dtype)
    change = input.float() @ down.t() @ up.t()
    assert_close(product.linear(input, weight, bias, low_rank, fast=True), expected + change)


@pytest.mark.parametrize("name", ["AWQ_INT4", "AWQ_INT4_HALF", "W4A16_FLOAT"])
def test_awq_has_the_values_of_its_weights_for_few_rows(name, forced):
    weight = random_weight(name, 64, 512)
    input = torch.randn(fast_by_kitchen.MAX_AWQ_TOKENS, 512).bfloat16()
    assert_close(product.linear(input, weight, fast=True), product.linear(input, weight))


def random_weight(name, rows, columns, rank=0):
    packed_format = FAMILIES[name].of_columns(columns)
    data, *sides = random_tensors(packed_format, rows, CPU, bounded=True)
    weight = packed_tensor(packed_format, data, (rows, columns), torch.float32, *sides)
    if not rank:
        return weight
    return with_low_rank(weight, torch.randn(rows, rank).bfloat16(),
                         torch.randn(rank, columns).bfloat16())


@pytest.mark.parametrize(("name", "rank"), [
    ("SVDQUANT_INT4", 0), ("SVDQUANT_INT4", 7), ("SVDQUANT_NVFP4", 0), ("SVDQUANT_NVFP4", 7),
    ("AWQ_INT4", 0)])
def test_a_weak_lora_has_its_strength(name, rank, monkeypatch):
    stand_in_nvfp4(monkeypatch)
    torch.manual_seed(rank)
    rows = columns = 256
    weight = random_weight(name, rows, columns, rank)
    up, down = torch.randn(rows, 4), torch.randn(4, columns)
    up *= 0.0005 * weight.dequantize().norm() / (up @ down).norm()
    gain = Gain()
    for _ in range(8):
        input = torch.randn(fast_by_kitchen.MAX_AWQ_TOKENS, columns).bfloat16()
        outs = [product.linear(input, weight, fast=True, low_rank=LowRank.from_factors(
            [(sign * up, down, (0, rows))], rows, torch.bfloat16)).float() for sign in (1, -1)]
        gain.add(outs[0] - outs[1], input.float() @ (2 * up @ down).t())
    assert 0.99 < gain.value < 1.01


# --- nvfp4, whose product comfy_kitchen has for GPUs alone ---

def stand_in_nvfp4(monkeypatch):
    """Registers functions of comfy_kitchen's own numbers that run on a CPU."""
    eager = registry.get_implementation
    own = BackendRegistry()
    dequantize = eager("dequantize_nvfp4", backend="eager")

    def multiply(a, b, tensor_scale_a, tensor_scale_b, block_scale_a, block_scale_b, bias,
                 out_dtype, alpha):
        first, second = (dequantize(codes, scale, blocks, torch.float32, hi_first=False)
                         for codes, scale, blocks in ((a, tensor_scale_a, block_scale_a),
                                                      (b, tensor_scale_b, block_scale_b)))
        return (first @ second[:len(b)].t()).to(out_dtype)

    functions = {function: eager(function, backend="eager") for each in fast_by_kitchen.PRODUCTS
                 .values() for function in each.functions} | {"scaled_mm_nvfp4": multiply}
    constraints = {function: registry.get_constraints("eager", function) or FunctionConstraints()
                   for function in functions}
    own.register("stand-in", types.SimpleNamespace(**functions), constraints)
    monkeypatch.setattr(fast_by_kitchen, "registry", own)
    monkeypatch.setattr(fast_by_kitchen, "BACKENDS", ("stand-in",))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("seed", range(4))
def test_nvfp4_quantises_the_smoothed_input_in_groups(seed, rank, monkeypatch):
    stand_in_nvfp4(monkeypatch)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, columns = 8 * draw.randint(2, 40), 64 * draw.randint(1, 6)
    weight = random_weight("SVDQUANT_NVFP4", rows, columns)
    main = weight.dequantize()
    if rank:
        weight = with_low_rank(weight, torch.randn(rows, rank).bfloat16() * main.abs().mean(),
                               torch.randn(rank, columns).bfloat16())
    input, bias = torch.randn(draw.randint(17, 90), columns).bfloat16(), torch.randn(rows)
    smooth = (1 / weight.params.column_scale).bfloat16()
    quantize, dequantize = (registry.get_implementation(f"{name}_nvfp4", backend="eager")
                            for name in ("quantize", "dequantize"))
    one = torch.ones(())
    codes, scales = quantize(input / smooth, one, 0.0, True, False)
    quantized = dequantize(codes, one, scales, torch.float32, hi_first=False)[:len(input)]
    expected = (quantized * smooth) @ main.t() + bias + input.float() @ (
        weight.dequantize() - main).t()
    assert_close(product.linear(input, weight, bias.bfloat16(), fast=True), expected)


# --- where which product runs ---

@pytest.fixture
def kitchen(monkeypatch):
    """A registry with comfy_kitchen's tables of its CUDA and AMD kernels, and a GPU's capability.
    """
    from comfy_kitchen.backends import cuda, hip

    own, gpu = BackendRegistry(), types.SimpleNamespace(capability=(8, 6))
    own.tables = {"cuda": cuda._build_constraints(), "hip": hip._build_constraints(True)}
    monkeypatch.setattr(fast_by_kitchen, "registry", own)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    own.gpu = gpu
    return own


GPU = torch.device("cuda:1")
INT4, AWQ_ROWS = (FAMILIES[name].of_columns(256) for name in ("SVDQUANT_INT4", "AWQ_INT4"))


@pytest.mark.parametrize("packed_format", [INT4, AWQ_ROWS], ids=str)
def test_the_registry_says_for_which_devices_there_are_kernels(packed_format, kitchen):
    def why(dtype=torch.bfloat16, device=GPU):
        reason = fast_by_kitchen.why_off(packed_format, device, dtype)
        runs = fast_by_kitchen.runs(packed_format, device, dtype)
        assert runs == (not reason and device.type == "cuda")
        return reason

    kitchen.mark_unavailable("cuda", "no such library")
    assert why().startswith("comfy_kitchen's CUDA kernels are off: no such library; a newer comfy")
    kitchen.register("cuda", types.SimpleNamespace(), kitchen.tables["cuda"])
    for kitchen.gpu.capability in ((8, 0), (8, 9), (12, 0)):
        assert not why() and not why(torch.float16)
    assert "float32" in why(torch.float32)
    for kitchen.gpu.capability in ((7, 5), (6, 1)):  # RTX 20, GTX 10
        assert "compute capability {}.{}, they need 8.0".format(*kitchen.gpu.capability) in why()
    kitchen.gpu.capability = (8, 6)
    kitchen.disable("cuda")
    assert "ComfyUI has turned them off" in why() and "cu130" in why()
    for device in ("cpu", "mps", "xpu"):
        assert not why(device=torch.device(device))


def test_amds_kernels_are_asked_for_by_their_own_table(kitchen, monkeypatch):
    from comfy_kitchen.backends import hip

    monkeypatch.setattr(torch.version, "hip", "7.0")
    kitchen.register("hip", types.SimpleNamespace(), hip._build_constraints(False))  # RDNA 2
    assert fast_by_kitchen.why_off(INT4, GPU, torch.bfloat16).startswith(
        "comfy_kitchen's AMD kernels are off: they have no scaled_mm_svdquant_w4a4 for this GPU")
    kitchen.register("hip", types.SimpleNamespace(), kitchen.tables["hip"])
    assert not fast_by_kitchen.why_off(INT4, GPU, torch.bfloat16)
    kitchen.disable("hip")
    assert "AMD kernels are off: something" in fast_by_kitchen.why_off(INT4, GPU, torch.bfloat16)


def test_int8_is_not_asked_for_where_its_maker_says_that_it_is_no_faster(kitchen, monkeypatch):
    assert all(rate < fast_by_kitchen.LEAST_RATE and url.startswith("https://")
               for _, rate, url, _ in fast_by_kitchen.SLOW_INT8)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kitchen.register("hip", types.SimpleNamespace(), kitchen.tables["hip"])
    found = {}
    for index, name in enumerate(("gfx1100", "gfx1102:xnack-", "gfx1201", "gfx950", "gfx9999")):
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device, name=name: types.SimpleNamespace(gcnArchName=name))
        found[name] = fast_by_kitchen.why_not_fast(torch.device("cuda", 40 + index),
                                                   torch.bfloat16)
    assert found["gfx1100"].endswith(
        ": gfx1100 multiplies integers of 8 bits hardly faster than floats of 16")
    assert "gfx1102 multiplies" in found["gfx1102:xnack-"]
    assert not any(found[name] for name in ("gfx1201", "gfx950", "gfx9999"))
    # weights that are made for codes of 4 bits are multiplied as before
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: types.SimpleNamespace(gcnArchName="gfx1100"))
    assert fast_by_kitchen.runs(INT4, torch.device("cuda", 40), torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", None)
    kitchen.register("cuda", types.SimpleNamespace(), kitchen.tables["cuda"])
    kitchen.gpu.capability = (10, 3)
    assert "sm_103" in fast_by_kitchen.why_not_fast(torch.device("cuda", 50), torch.bfloat16)
    kitchen.gpu.capability = (12, 0)
    assert not fast_by_kitchen.why_not_fast(torch.device("cuda", 51), torch.bfloat16)


def test_an_older_comfy_kitchen_has_no_product_of_nvfp4(monkeypatch):
    stand_in_nvfp4(monkeypatch)
    nvfp4, own = FAMILIES["SVDQUANT_NVFP4"].of_columns(256), fast_by_kitchen.registry
    assert fast_by_kitchen.runs(nvfp4, CPU, torch.bfloat16)
    module = own._backends["stand-in"]
    module.quantize_nvfp4 = lambda x, per_tensor_scale, epsilon=0.0, pad_16x=False: None
    assert not fast_by_kitchen.runs(nvfp4, CPU, torch.bfloat16)
    assert fast_by_kitchen.runs(INT4, CPU, torch.bfloat16)


def test_other_formats_have_no_such_product():
    for name in ("INT8_ROWS", "NVFP4_ROWS", "INT4_CONVROT"):
        packed_format = FAMILIES[name].of_columns(256)
        assert fast_by_kitchen.product_of(packed_format) is None
        assert not fast_by_kitchen.why_off(packed_format, GPU, torch.bfloat16)
    mixed = join_packed([random_weight(name, 16, 256) for name in ("SVDQUANT_INT4", "AWQ_INT4")], 0)
    assert fast_by_kitchen.product_of(mixed.params.format) is None


def test_a_cpu_multiplies_as_before_and_few_rows_are_exact(monkeypatch):
    weight = random_weight("SVDQUANT_INT4", 64, 256, 4)
    many, few = torch.randn(200, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    layer = packed_operations(compute="int8").Linear(256, 64, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(many), product.linear(many, weight, fast=True))
    monkeypatch.setattr(fast_by_kitchen, "BACKENDS", ("eager",))
    exact = product.linear(many, weight)
    assert not torch.equal(layer(many), exact)
    assert torch.equal(layer(few), product.linear(few, weight))
    odd = random_weight("SVDQUANT_INT4", 63, 256, 4)
    assert torch.equal(product.linear(many, odd, fast=True), without_comfy_kitchen(many, odd))
    layer = packed_operations().Linear(256, 64, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(many), exact)


def test_a_product_is_one_graph_and_gradients_are_exact(forced):
    weight, input = random_weight("SVDQUANT_INT4", 64, 256, 4), torch.randn(20, 256)

    def run(input):
        return product.linear(input, weight, fast=True) * 2

    with torch.inference_mode():
        compiled = torch.compile(run, backend="eager", fullgraph=True)(input)
        assert torch.equal(compiled, run(input))
    input.requires_grad_()
    product.linear(input, weight, fast=True).sum().backward()
    torch.testing.assert_close(input.grad, weight.dequantize().sum(0).expand(20, -1))


def test_codes_that_are_not_aligned_are_copied(forced):
    weight = random_weight("SVDQUANT_INT4", 64, 256, 4)
    codes, *sides = packed_tensors(weight)
    moved = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].copy_(codes.view(-1))
    again = packed_tensor(weight.params.format, moved, weight.shape, weight.dtype, *sides)
    input = torch.randn(20, 256).bfloat16()
    assert fast_by_kitchen._aligned(moved).data_ptr() % fast_by_kitchen.ALIGNMENT == 0
    assert torch.equal(product.linear(input, again, fast=True),
                       product.linear(input, weight, fast=True))


def test_comfy_kitchen_keeps_no_buffers_for_every_size_of_an_input():
    from comfy_kitchen.backends import cuda

    assert isinstance(cuda._SVDQUANT_WORKSPACE_CACHE, dict)  # or keeps none any more
    cuda._SVDQUANT_WORKSPACE_CACHE["a size"] = torch.zeros(3),
    fast_by_kitchen._forget_buffers(cuda.quantize_svdquant_w4a4)
    assert not cuda._SVDQUANT_WORKSPACE_CACHE
