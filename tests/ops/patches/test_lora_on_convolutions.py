"""LoRAs on packed convolutions: of every kind, on parts of the weight, and with an input that has
no batch."""
import comfy.lora
import pytest
import torch
from pack_api import is_packed, product
from patched_layers import (
    CONVOLUTIONS,
    KERNELS,
    PATCHES,
    input_for,
    layer_and_twin,
    plain_lora,
    with_patches,
)
from patched_models import KINDS, relative

from featherweight.ops.layers.workspace import shared_workspace

pytestmark = [pytest.mark.usefixtures("fixed_seed", "no_gradients")]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "kernel", "kind"), [
    *(("Conv2d", (3, 3), kind) for kind in KINDS if kind != "loha-dora"),
    *((name, kernel, kind) for name, kernel in (
        ("Conv2d", (1, 1)), ("Conv1d", (3,)), ("Conv3d", (1, 2, 2)))
      for kind in ("lora", "dora", "lokr"))])
def test_every_kind_of_lora_has_its_effect(name, kernel, kind):
    layer, twin = layer_and_twin(name, "Q8_0", kind, torch.float32, kernel)
    input = input_for(name)
    assert relative(layer(input), twin(input)) < 3e-6 and is_packed(layer.weight)


@pytest.mark.parametrize(("name", "dimension"), [
    (name, dimension) for name in CONVOLUTIONS for dimension in range(2 + len(KERNELS[name]))])
def test_a_lora_on_a_part_of_the_weight_has_its_effect_on_that_part(name, dimension):
    layer, twin = layer_and_twin(name, "Q8_0", None, torch.float32)
    shape, input = layer.weight.shape, input_for(name)
    offset = dimension, shape[dimension] // 4, max(1, shape[dimension] // 2)
    rows, *columns = torch.empty(shape).narrow(*offset).shape
    patches = [(0.9, plain_lora(rows, *columns, spread=1 / 3), 1.0, offset, None)]
    added = comfy.lora.calculate_weight(patches, torch.zeros(shape), "weight")
    expected = getattr(torch.nn.functional, name.lower())(input, added)
    assert relative(with_patches(layer, patches)(input) - twin(input), expected) < 1e-5
    assert (layer.lora.low_rank is not None) == (dimension < 2)


@each_dtype
@pytest.mark.parametrize("kind", [None, *PATCHES])
@each_convolution
def test_an_input_without_a_batch_is_one_of_a_batch(name, kind, dtype):
    layer, _ = layer_and_twin(name, "Q8_0", kind, dtype)
    input = input_for(name).to(dtype)
    assert torch.equal(layer(input[1]), layer(input[1:])[0])
    assert layer(input[1]).ndim == 1 + len(KERNELS[name])


@pytest.mark.parametrize("format_name", ["Q8_0", "Q5_1"])
@each_dtype
@each_convolution
def test_a_weight_in_slices_gives_the_numbers_of_the_whole_weight(name, dtype, format_name,
                                                                 monkeypatch):
    layer, _ = layer_and_twin(name, format_name, None, dtype)
    input = input_for(name).to(dtype)
    whole = layer(input)
    monkeypatch.setattr(product, "CONVOLUTION_BYTES", 1)
    monkeypatch.setattr(product, "CHANNEL_BLOCK", 2)
    assert len(list(product.dequantized_slices(layer.weight, dtype))) > 1
    assert torch.equal(layer(input), whole)


def test_an_error_in_a_convolution_leaves_the_workspace_free():
    layer, _ = layer_and_twin("Conv2d", "Q8_0", None, torch.float32)
    input = input_for("Conv2d")
    with pytest.raises(RuntimeError) as kept:
        layer(input[:, 1:])
    assert not shared_workspace().lock.locked(), kept
    layer(input)


@each_convolution
def test_a_packed_layer_inside_a_convolution_has_a_workspace_of_its_own(name, monkeypatch):
    layer, _ = layer_and_twin(name, "Q8_0", None, torch.float32)
    inner, _ = layer_and_twin("Linear", "Q8_0", None, torch.float32)
    input, inside = input_for(name), torch.randn(130, inner.in_features)
    expected, expected_inside, seen = layer(input), inner(inside), []
    convolution = getattr(torch.nn, name)
    convolve = convolution._conv_forward

    def hooked(self, *args, **kwargs):  # as packs wrap it
        seen.append(inner(inside))
        return convolve(self, *args, **kwargs)

    monkeypatch.setattr(convolution, "_conv_forward", hooked)
    assert torch.equal(layer(input), expected)
    assert seen and all(torch.equal(each, expected_inside) for each in seen)
