"""Dynamic VRAM, which the host uses on GPUs: LoRA on packed weights."""
from typing import Any, NamedTuple

import dynamic_vram
import pytest
import torch
from patched_models import (
    LIMIT,
    adapter,
    dense_flux,
    error_by_effect,
    flux_file,
    flux_inputs,
    forget_models,
    forward,
    limit,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    plain_outputs,
    run,
)

from featherweight.ops.patcher import PackedPatcher
from featherweight.ops.tensor.packed_layout import QuantizedTensor

pytestmark = pytest.mark.fake_gpus(dynamic=True)


@pytest.fixture(autouse=True)
def uploads(monkeypatch):
    """The list of modules whose weights were uploaded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield dynamic_vram.uploads(monkeypatch)
    torch.set_num_threads(threads)
    forget_models()


def step(patcher, inputs=None):
    patcher.partially_load(patcher.load_device)
    return forward(patcher, inputs)


def slots(patcher):
    return [module for module in patcher.model.modules() if hasattr(module, "_v")]


class Models(NamedTuple):
    """A dynamic packed patcher and a dense one, their outputs without patches, the dense values."""

    packed: Any
    dense: Any
    plain: torch.Tensor
    without: torch.Tensor
    values: dict[str, torch.Tensor]
    limit: float

    def error(self, actual: torch.Tensor, expected: torch.Tensor) -> float:
        return error_by_effect(actual, expected, self.without, self.plain) / self.limit


# a format of ours, and some of the host's beside NF4: computed by the host in float, by its own
# product, and by us
@pytest.fixture(params=["Q4_K", "float8_e4m3fn", "int8_tensorwise", "nvfp4 exact"])
def models(request, uploads):
    packed, dense = packed_flux(request.param), dense_flux(request.param)
    plain, without = plain_outputs(packed, dense, request.param,
                                   lambda patcher: step(patcher) if patcher is packed
                                   else run(patcher))
    return Models(packed, dense, plain, without, flux_file(request.param)[1],
                  limit(request.param))


def test_loras_stack_switch_and_go(models, uploads):
    packed, dense, plain, without, values, _ = models
    first, second, third = (
        lora_for(values, seed=1),
        lora_for(values, seed=2),
        lora_for(values, "dora", seed=3),
    )
    second["diffusion_model.double_blocks.0.img_mlp.0.diff_b"] = torch.full((1024,), 0.1)
    every = len(uploads)
    assert every == len(slots(packed)) > 10
    assert torch.equal(step(packed), plain) and len(uploads) == every
    count = len(packed_layers(packed))
    bias_layer = packed.model.diffusion_model.double_blocks[0].img_mlp[0]
    for stack in (
        [(first, 1.0)],
        [(first, 0.4)],
        [(first, 0.4), (second, 0.7)],
        [(third, 0.8), (first, 0.5)],
        [(second, 1.0)],
        [],
    ):
        uploads.clear()
        actual, expected = step(patched(packed, *stack)), run(patched(dense, *stack))
        if stack:
            assert models.error(actual, expected) < 1
        else:
            assert torch.equal(actual, plain)
        assert all(not isinstance(module.weight, QuantizedTensor) or module is bias_layer
                   for module in uploads)
        assert len(packed_layers(packed)) == count
    assert not any(layer.lora for layer in packed_layers(packed))


def test_wrappers_see_the_patched_weight(models, uploads):
    packed, dense, plain, _, values, _ = models
    lora = lora_for(values)
    outputs = []
    for patcher in (packed, dense):
        patcher = patched(patcher, (lora, 1.0))
        patcher.add_weight_wrapper("diffusion_model.double_blocks.0.img_mlp.2.weight",
                                   lambda weight: weight.relu())
        outputs.append((step if patcher.is_dynamic() else run)(patcher))
    assert models.error(*outputs) < 1
    assert torch.equal(step(packed), plain)


def test_a_reshaping_lora_replaces_the_layer_and_gives_it_back(uploads):
    packed, dense = packed_flux("Q8_0"), dense_flux("Q8_0")
    values, inputs, without = flux_file("Q8_0")[1], flux_inputs(concat=True), run(dense)
    factors = adapter("lora", torch.cat([values["img_in.weight"]] * 2, 1), 1)
    control = {"diffusion_model.img_in.lora_A.weight": factors["lora_down.weight"],
               "diffusion_model.img_in.lora_B.weight": factors["lora_up.weight"],
               "diffusion_model.img_in.reshape_weight": torch.tensor([256, 128])}
    plain = lora_for(values)
    count = len(packed_layers(packed))
    stack = (plain, 0.5), (control, 1.0)
    assert torch.equal(step(packed), without)
    assert (
        error_by_effect(
            step(patched(packed, *stack), inputs), run(patched(dense, *stack), inputs), without
        )
        < LIMIT
    )
    assert len(packed_layers(packed)) == count - 1
    for _ in range(2):
        assert torch.equal(step(packed), without) and len(packed_layers(packed)) == count


def test_a_layer_that_is_called_on_the_cpu_has_its_patches(models, uploads):
    packed, dense, *_ = models
    values = {name: value for name, value in models.values.items()
              if name.startswith("double_blocks")}
    stack = [(lora_for(values, "dora"), 0.5), (lora_for(values, seed=1), 0.8)]
    patcher = patched(packed, *stack)
    step(patcher)
    found = set(packed_layers(packed))
    layers = {
        name: layer for name, layer in packed.model.named_modules()
        if layer in found and "double" in name
    }
    inputs = {name: torch.randn(3, layer.in_features) for name, layer in layers.items()}

    def outputs(model):
        return {name: model.get_submodule(name)(inputs[name]) for name in layers}

    found, without = outputs(packed.model), outputs(dense.model)
    run(patched(dense, *stack))
    for name, expected in outputs(dense.model).items():
        assert error_by_effect(found[name], expected, without[name]) < models.limit


def test_the_delegate_without_dynamic_vram_is_packed_and_patched(models, uploads):
    packed, dense, *_ = models
    lora = lora_for(models.values)
    patcher = patched(packed, (lora, 1.0))
    expected = run(patched(dense, (lora, 1.0)))
    step(patcher)
    delegate = patcher.get_non_dynamic_delegate()
    assert (
        isinstance(delegate, PackedPatcher)
        and not delegate.is_dynamic()
        and delegate.model is not packed.model
    )
    assert models.error(run(delegate), expected) < 1
    assert len(packed_layers(delegate)) == len(packed_layers(packed))
    assert patcher.get_non_dynamic_delegate().model is delegate.model
    assert models.error(step(patcher), expected) < 1


def test_integers_of_the_hosts_formats_are_saved_as_they_are(uploads):
    patcher = packed_flux("int8_tensorwise")
    step(patcher)
    saved = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    for part, value in layer.weight.state_dict("weight").items():
        assert torch.equal(saved[f"single_blocks.0.linear2.{part}"].to("cpu"), value)
    assert "single_blocks.0.linear2.comfy_quant" in saved
