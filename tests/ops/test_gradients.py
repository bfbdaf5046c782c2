"""Gradients of the input through layers with patches: those of the dense layer with the patches in its weight."""
import comfy.lora
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from featherweight.ops.lora import build_patches
from featherweight.ops.operations import packed_operations
from host_formats import HOST_FORMATS, in_host_format
from patched_models import packed_anyhow, relative

ROWS, COLUMNS, RANK = 48, 256, 4
KERNELS = {"Linear": (), "Conv1d": (3,), "Conv2d": (3, 3), "Conv3d": (1, 2, 2)}
LAYERS = [*((name, "Q8_0") for name in KERNELS),
          *(("Linear", name) for name in HOST_FORMATS if name != "convrot_w4a4")]  # whose product in the host has none
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def same_inputs():
    torch.manual_seed(0)


def patches_for(kind: str, shape: torch.Size) -> list:
    """The host's, large beside a weight of randn / 8."""
    one = (1,) * (len(shape) - 2)
    up, down = torch.randn(shape[0], RANK, *one) / 8, torch.randn(RANK, *shape[1:]) / 8
    lora = (1.0, LoRAAdapter(set(), (up, down, None, None, None, None)), 1.0, None, None)
    return [lora] if kind == "lora" else [(1.0, ("diff", (torch.randn(shape) / 8,)), 0.5, None, None), lora]


def layer_and_twin(name: str, format_name: str, kind: str, dtype: torch.dtype):
    """(a layer that runs patches, the function of torch with the weight that they make in float32)"""
    kernel = KERNELS[name]
    values = torch.randn(ROWS, COLUMNS, *kernel) / 8
    hosts = format_name in HOST_FORMATS
    if hosts:
        parts, values = in_host_format("weight", values, format_name)
    else:
        packed, values = packed_anyhow(values, format_name)
        parts = {"weight": packed}
    layer = getattr(packed_operations(mixed=hosts), name)(COLUMNS, ROWS, *([kernel] if kernel else []), dtype=dtype)
    layer.load_state_dict(parts | {"bias": torch.linspace(-1, 1, ROWS).to(dtype)})
    patches = patches_for(kind, values.shape)
    layer.lora = build_patches("weight", patches, values.shape, torch.device("cpu"), dtype, layer.has_branch)
    merged = comfy.lora.calculate_weight(patches, values.clone(), "weight")
    function = getattr(torch.nn.functional, name.lower())
    return layer, lambda input: function(input, merged, torch.linspace(-1, 1, ROWS))


def input_for(name: str) -> torch.Tensor:
    return torch.randn(3, COLUMNS) if name == "Linear" else torch.randn(2, COLUMNS, *(size + 4 for size in KERNELS[name]))


def gradient(layer, input: torch.Tensor) -> torch.Tensor:
    input = input.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = layer(input)
        (out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum().backward()
    return input.grad.float()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", ["lora", "diff and lora"])
@pytest.mark.parametrize("name, format_name", LAYERS)
def test_patches_are_part_of_the_gradient(name, format_name, kind, dtype):
    layer, twin = layer_and_twin(name, format_name, kind, dtype)
    input = input_for(name).to(dtype)
    assert relative(gradient(layer, input), gradient(twin, input.float())) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "Linear"])
def test_a_convolution_gives_the_same_with_gradients_and_without(name, dtype):
    """Bit for bit: so its weak LoRAs have their strength in both."""
    layer, _ = layer_and_twin(name, "Q8_0", "lora", dtype)
    input = input_for(name).to(dtype)
    with torch.no_grad():
        expected = layer(input)
    assert torch.equal(layer(input.clone().requires_grad_()), expected)
