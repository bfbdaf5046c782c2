"""Gradients of the input through layers with patches: those of the dense layer with the patches in
its weight."""
import pytest
import torch
from patched_layers import CONVOLUTIONS, LAYERS, PATCHES, input_for, layer_and_twin
from patched_models import relative

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", [
    torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.heavy)], ids=str)
# in the host
DIFFERENTIABLE = [
    (name, format_name) for name, format_name in LAYERS if format_name != "convrot_w4a4"
]


pytestmark = pytest.mark.usefixtures("fixed_seed")


def gradient(layer, input: torch.Tensor) -> torch.Tensor:
    input = input.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = layer(input)
        (out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum().backward()
    return input.grad.float()


@each_dtype
@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize(("name", "format_name"), DIFFERENTIABLE)
def test_patches_are_part_of_the_gradient(name, format_name, kind, dtype):
    layer, twin = layer_and_twin(name, format_name, kind, dtype)
    input = input_for(name).to(dtype)
    assert relative(gradient(layer, input), gradient(twin, input.float())) < CLOSE[dtype]


@each_dtype
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_gives_the_same_with_gradients_and_without(name, dtype):
    """Bit for bit: so its weak LoRAs have their strength in both."""
    layer, _ = layer_and_twin(name, "Q8_0", "lora", dtype)
    input = input_for(name).to(dtype)
    with torch.no_grad():
        expected = layer(input)
    assert torch.equal(layer(input.clone().requires_grad_()), expected)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("dtype", [
    torch.float32, *(pytest.param(dtype, marks=pytest.mark.heavy)
                     for dtype in (torch.float16, torch.bfloat16))], ids=str)
@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize(("name", "format_name"), DIFFERENTIABLE)
def test_patches_of_a_model_loaded_in_inference_mode_have_their_gradient(
        name, format_name, kind, dtype, offloaded):
    """As the host loads models; nodes take gradients outside of it."""
    expected = gradient(
        layer_and_twin(name, format_name, kind, dtype)[0],
        input_for(name).to(dtype))
    torch.manual_seed(0)
    with torch.inference_mode():
        layer, _ = layer_and_twin(name, format_name, kind, dtype)
        input = input_for(name).to(dtype)
        if offloaded:
            layer.lora.offload(torch.device("cpu"))
        layer(input)
    assert torch.equal(gradient(layer, input), expected)


@pytest.mark.parametrize("kind", [None, "lora"])
def test_no_dense_weight_is_kept_for_the_gradient(kind):
    """Of a model in training only the packed weights are in memory, and one dense at a time."""
    layer, twin = layer_and_twin("Linear", "Q8_0", kind, torch.float32)
    input, kept = input_for("Linear").requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        layer(input)
    assert all(tensor.numel() < layer.weight.numel() for tensor in kept)
    with torch.no_grad():
        expected = layer(input)
    assert torch.equal(layer(input), expected)
    assert relative(gradient(layer, input), gradient(twin, input)) < 1e-5


@pytest.mark.filterwarnings("error")  # torch's about an operator without a gradient
def test_a_bias_has_its_gradient_where_the_input_has_none():
    layer, _ = layer_and_twin("Linear", "Q8_0", None, torch.float32)
    change = torch.zeros(len(layer.bias), dtype=torch.float32, requires_grad=True)
    layer.bias_function = [lambda bias: bias + change]
    layer(input_for("Linear")).sum().backward()
    assert torch.equal(change.grad, torch.full_like(change, 3.0))  # rows of the input
