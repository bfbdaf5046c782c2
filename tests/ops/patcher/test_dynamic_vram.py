"""Dynamic VRAM, which the host uses on GPUs: LoRA on packed weights."""
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
    lora_for,
    packed_flux,
    packed_layers,
    patched,
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


# a format of ours, and one of the host's beside NF4, computed by the host and by us
@pytest.fixture(params=["Q4_K", "float8_e4m3fn", "nvfp4 exact"])
def models(request):
    """(dynamic packed patcher, dense patcher, dense output without patches, dense values)"""
    packed, dense = packed_flux(request.param), dense_flux(request.param)
    return packed, dense, run(dense), flux_file(request.param)[1]


def test_loras_stack_switch_and_go(models, uploads):
    packed, dense, without, values = models
    first, second, third = (
        lora_for(values, seed=1),
        lora_for(values, seed=2),
        lora_for(values, "dora", seed=3),
    )
    second["diffusion_model.double_blocks.0.img_mlp.0.diff_b"] = torch.full((1024,), 0.1)
    assert torch.equal(step(packed), without) and len(slots(packed)) > 10
    every = len(uploads)
    assert every == len(slots(packed))
    assert torch.equal(step(packed), without) and len(uploads) == every
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
            assert error_by_effect(actual, expected, without) < LIMIT
        else:
            assert torch.equal(actual, without)
        assert all(not isinstance(module.weight, QuantizedTensor) or module is bias_layer
                   for module in uploads)
        assert len(packed_layers(packed)) == count
    assert not any(layer.lora for layer in packed_layers(packed))


def test_wrappers_see_the_patched_weight(models, uploads):
    packed, dense, without, values = models
    lora = lora_for(values)
    outputs = []
    for patcher in (packed, dense):
        patcher = patched(patcher, (lora, 1.0))
        patcher.add_weight_wrapper("diffusion_model.double_blocks.0.img_mlp.2.weight",
                                   lambda weight: weight.relu())
        outputs.append((step if patcher.is_dynamic() else run)(patcher))
    assert error_by_effect(*outputs, without) < LIMIT
    assert torch.equal(step(packed), without)


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
    packed, dense, _, values = models
    values = {name: value for name, value in values.items() if name.startswith("double_blocks")}
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
        assert error_by_effect(found[name], expected, without[name]) < LIMIT


def test_the_delegate_without_dynamic_vram_is_packed_and_patched(models, uploads):
    packed, dense, without, values = models
    lora = lora_for(values)
    patcher = patched(packed, (lora, 1.0))
    expected = run(patched(dense, (lora, 1.0)))
    step(patcher)
    delegate = patcher.get_non_dynamic_delegate()
    assert (
        isinstance(delegate, PackedPatcher)
        and not delegate.is_dynamic()
        and delegate.model is not packed.model
    )
    assert error_by_effect(run(delegate), expected, without) < LIMIT
    assert len(packed_layers(delegate)) == len(packed_layers(packed))
    assert patcher.get_non_dynamic_delegate().model is delegate.model
    assert error_by_effect(step(patcher), expected, without) < LIMIT


def test_integers_of_the_hosts_formats_are_saved_as_they_are(uploads):
    patcher = packed_flux("int8_tensorwise")
    step(patcher)
    saved = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    for part, value in layer.weight.state_dict("weight").items():
        assert torch.equal(saved[f"single_blocks.0.linear2.{part}"].to("cpu"), value)
    assert "single_blocks.0.linear2.comfy_quant" in saved
