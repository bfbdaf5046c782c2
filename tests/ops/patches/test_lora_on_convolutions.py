"""LoRAs on packed convolutions: on parts of the weight, and with an input that has no batch."""
import comfy.lora
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from patched_layers import CONVOLUTIONS, KERNELS, PATCHES, RANK, input_for, layer_and_twin
from patched_models import relative

from featherweight.ops.layers import product
from featherweight.ops.layers.workspace import shared_workspace
from featherweight.ops.patches.layer_patches import build_patches

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("fixed_seed")


def lora_on(part: torch.Size) -> LoRAAdapter:
    factors = torch.randn(part[0], RANK) / 8, torch.randn(RANK, *part[1:]) / 8
    return LoRAAdapter(set(), (*factors, None, None, None, None))


@pytest.mark.parametrize(("name", "dimension"), [
    (name, dimension) for name in CONVOLUTIONS for dimension in range(2 + len(KERNELS[name]))])
def test_a_lora_on_a_part_of_the_weight_has_its_effect_on_that_part(name, dimension):
    layer, twin = layer_and_twin(name, "Q8_0", None, torch.float32)
    shape = layer.weight.shape
    offset = dimension, shape[dimension] // 4, max(1, shape[dimension] // 2)
    patches = [(0.9, lora_on(torch.empty(shape).narrow(*offset).shape), 1.0, offset, None)]
    layer.lora = build_patches("weight", patches, shape, CPU, torch.float32, layer.has_branch)
    added = comfy.lora.calculate_weight(patches, torch.zeros(shape), "weight")
    input = input_for(name)
    with torch.no_grad():
        assert (
            relative(
                layer(input) - twin(input), getattr(torch.nn.functional, name.lower())(input, added)
            )
            < 1e-5
        )
    assert (layer.lora.low_rank is not None) == (dimension < 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, *PATCHES])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_input_without_a_batch_is_one_of_a_batch(name, kind, dtype):
    layer, _ = layer_and_twin(name, "Q8_0", kind, dtype)
    input = input_for(name).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(input[1]), layer(input[1:])[0])
    assert layer(input[1]).ndim == 1 + len(KERNELS[name])


@pytest.mark.parametrize("format_name", ["Q8_0", "Q5_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_weight_in_slices_gives_the_numbers_of_the_whole_weight(name, dtype, format_name,
                                                                 monkeypatch):
    layer, _ = layer_and_twin(name, format_name, None, dtype)
    input = input_for(name).to(dtype)
    with torch.no_grad():
        whole = layer(input)
        monkeypatch.setattr(product, "CONVOLUTION_BYTES", 1)
        monkeypatch.setattr(product, "CHANNEL_BLOCK", 2)
        slices = list(product.dequantized_slices(layer.weight, dtype))
        assert len(slices) > 1
        assert torch.equal(layer(input), whole)


def test_an_error_in_a_convolution_leaves_the_workspace_free():
    layer, _ = layer_and_twin("Conv2d", "Q8_0", None, torch.float32)
    input = input_for("Conv2d")
    with pytest.raises(RuntimeError) as kept:
        layer(input[:, 1:])
    assert not shared_workspace().lock.locked(), kept
    layer(input)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_packed_layer_inside_a_convolution_has_a_workspace_of_its_own(name, monkeypatch):
    layer, _ = layer_and_twin(name, "Q8_0", None, torch.float32)
    inner, _ = layer_and_twin("Linear", "Q8_0", None, torch.float32)
    input, inside = input_for(name), torch.randn(130, inner.in_features)
    with torch.no_grad():
        expected, expected_inside, seen = layer(input), inner(inside), []
        convolution = getattr(torch.nn, name)
        convolve = convolution._conv_forward

        def hooked(self, *args, **kwargs):  # as packs wrap it
            seen.append(inner(inside))
            return convolve(self, *args, **kwargs)

        monkeypatch.setattr(convolution, "_conv_forward", hooked)
        assert torch.equal(layer(input), expected)
    assert seen and all(torch.equal(each, expected_inside) for each in seen)
