"""LoRAs on layers whose product is ComfyUI's own, by comfy_kitchen: they have their full strength,
take as many launches as one does, and leave the weights as they are."""
import random

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor import get_layout_class
from host_formats import HOST_VARIANTS, by_kitchen, in_host_format
from host_patches import patched_by_host
from kernel_cases import cpu_kernels
from lora_gain import Gain
from pack_api import FORMATS, packed_operations, packed_tensor
from patched_layers import plain_lora, with_patches

from featherweight.ops.layers.rounded_sum import add_small
from featherweight.ops.stochastic_rounding import stochastic_round

NORMS = (0.0005, 0.003, 0.05)  # of the change, divided by that of the weight
ALLOWED = 0.01
OUTPUTS = 1 << 20  # over which the rounding averages out to a quarter of what is allowed

each_format = pytest.mark.parametrize(
    ("format_name", "config"), HOST_VARIANTS,
    ids=["-".join((name, *config)) for name, config in HOST_VARIANTS])


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(0)
    random.seed(request.node.name)


def host_layer(format_name: str, config: dict, monkeypatch, shape=None, dtype=torch.bfloat16,
               bias: bool = True):
    """(a layer that comfy_kitchen multiplies, its dense float32 weight)"""
    rows, columns = shape or (random.randrange(16, 64) * 32, random.choice((256, 512, 768)))
    parts, values = in_host_format("weight", torch.randn(rows, columns) / columns**0.5,
                                   format_name, **config)
    layer = packed_operations(mixed=True).Linear(columns, rows, bias=bias, dtype=dtype)
    layer.load_state_dict(parts | ({"bias": torch.randn(rows)} if bias else {}))
    return by_kitchen(layer, monkeypatch), values


def plain_loras(values: torch.Tensor, count: int, norm: float, offset=None) -> list:
    """The host's patches of LoRAs that together change the weight by a share of its norm."""
    rows, columns = values.shape if offset is None else (offset[2], values.shape[1])
    loras = [plain_lora(rows, columns, rank=rank) for rank in random.choices((1, 4, 16), k=count)]
    change = sum(lora.weights[0] @ lora.weights[1] for lora in loras)
    strength = norm * (values.norm() / change.norm()).item()
    return [(strength, lora, 1.0, offset, None) for lora in loras]


def change_of(patches: list, values: torch.Tensor) -> torch.Tensor:
    return patched_by_host(patches, values) - values


# --- strength ---


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.bfloat16, 3),
                                              (torch.float16, 3)], ids=str)
@each_format
def test_a_lora_has_its_full_strength(format_name, config, dtype, count, monkeypatch):
    layer, values = host_layer(format_name, config, monkeypatch, dtype=dtype,
                               bias=random.random() < 0.5)
    rows, columns = values.shape
    for norm in NORMS:
        patches, gain = plain_loras(values, count, norm), Gain()
        change, share = change_of(patches, values).t(), (NORMS[0] / norm)**2
        for _ in range(max(1, round(OUTPUTS * share / (rows * 1024)))):
            input = torch.randn(1024, columns).to(dtype)
            with torch.no_grad():
                layer.lora = None
                without = layer(input).float()
                after = with_patches(layer, patches, dtype)(input).float()
            gain.add(after - without, input.float() @ change)
        assert abs(gain.value - 1) <= ALLOWED, f"{norm:.2%}: {gain.value:.4f} of it arrives"


@each_format
def test_in_float32_the_sum_is_exact(format_name, config, monkeypatch):
    layer, values = host_layer(format_name, config, monkeypatch, dtype=torch.float32)
    patches = plain_loras(values, 2, 0.05)
    input = torch.randn(2, 3, values.shape[1])
    with torch.no_grad():
        without = layer(input)
        after = with_patches(layer, patches)(input)
    expected = without + input @ change_of(patches, values).t()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


# --- what it costs ---


def launches(layer, input: torch.Tensor) -> list[str]:
    """The operators of torch that a layer runs, those within others too."""
    with torch.no_grad():
        layer(input)  # casts the factors
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(input)
    return sorted(event.name for event in profile.events() if "::" in event.name)


def exact_layer(dtype):
    packed_format, shape = FORMATS["Q8_0"], (1536, 512)
    codes = torch.randint(0, 64, (shape[0] * shape[1] // 32, packed_format.block_bytes),
                          dtype=torch.uint8)
    layer = packed_operations().Linear(shape[1], shape[0], dtype=dtype)
    layer.load_state_dict({"weight": packed_tensor(packed_format, codes, shape),
                           "bias": torch.randn(shape[0])})
    return layer, torch.randn(shape)


# three as of q, k and v in one weight
@pytest.mark.parametrize(("dtype", "slices"), [(torch.bfloat16, 1), (torch.float32, 3)], ids=str)
@pytest.mark.parametrize(("format_name", "config"), [*HOST_VARIANTS, ("exact", {})], ids=str)
def test_launches_do_not_grow_with_the_number_of_loras(format_name, config, dtype, slices,
                                                       monkeypatch):
    if format_name == "exact":
        layer, values = exact_layer(dtype)
    else:
        layer, values = host_layer(format_name, config, monkeypatch, (1536, 512), dtype)
    rows = len(values) // slices
    input, counts = torch.randn(300, values.shape[1]).to(dtype), {}
    for count in (1, 2, 5):
        patches = [patch for index in range(slices) for patch in plain_loras(
            values, count, 0.01, (0, index * rows, rows) if slices > 1 else None)]
        counts[count] = launches(with_patches(layer, patches, dtype), input)
    assert counts[1] == counts[2] == counts[5]
    layer.lora = None
    # down and, of each slice, up; behind that the sum
    if format_name != "exact" and dtype == torch.float32:
        assert multiplications(counts[1]) - multiplications(launches(layer, input)) == 1 + slices


def multiplications(names: list[str]) -> int:
    return sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)


# --- what stays as it is ---


@each_format
def test_nothing_is_quantised_again(format_name, config, monkeypatch):
    layer, values = host_layer(format_name, config, monkeypatch)
    layout = get_layout_class(QUANT_ALGOS[format_name]["comfy_tensor_layout"])
    quantise, shapes = layout.quantize.__func__, []

    def watched(cls, tensor, *args, **kwargs):
        shapes.append(tuple(tensor.shape))
        return quantise(cls, tensor, *args, **kwargs)

    monkeypatch.setattr(layout, "quantize", classmethod(watched))
    before = {name: part.clone() for name, part in layer.weight.state_dict("weight").items()}
    weight, input = layer.weight, torch.randn(5, values.shape[1]).bfloat16()
    with torch.no_grad():
        layer(input)
        without = list(shapes)
        with_patches(layer, plain_loras(values, 2, 0.01), torch.bfloat16)(input)
    assert shapes == without * 2 and values.shape not in shapes
    assert layer.weight is weight
    for name, part in layer.weight.state_dict("weight").items():
        assert torch.equal(*(tensor.reshape(-1).view(torch.uint8)
                             for tensor in (part, before[name]))), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_kernel_adds_and_rounds(dtype, tmp_path):
    value, change = torch.randn(300, 64).to(dtype), torch.randn(300, 64).to(dtype) / 100
    expected = stochastic_round(value.float() + change, dtype)
    with cpu_kernels(tmp_path):
        assert torch.equal(add_small(value.clone(), change), expected)  # compiles it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            added = add_small(value, change)
    assert added is value and torch.equal(value, expected)
    assert not [event.name for event in profile.events() if "::" in event.name]
