"""What only dynamic VRAM has, which the host uses on GPUs, on a model with LoRAs."""
import pytest
import torch
from patched_models import (
    error_by_effect,
    limit,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    run,
)
from patcher_models import in_dynamic_vram

from featherweight.ops.patcher import PackedPatcher


@in_dynamic_vram
def test_a_layer_that_is_called_on_the_cpu_has_its_patches(models):
    packed, dense = models.pair
    values = {name: value for name, value in models.values.items()
              if name.startswith("double_blocks")}
    stack = [(lora_for(values, "dora"), 0.5), (lora_for(values, seed=1), 0.8)]
    run(patched(packed, *stack))
    found = set(packed_layers(packed))
    inputs = {name: torch.randn(3, layer.in_features) for name, layer in
              packed.model.named_modules() if layer in found and "double" in name}

    def outputs(model):
        return {name: model.get_submodule(name)(input) for name, input in inputs.items()}

    actual, without = outputs(packed.model), outputs(dense.model)
    run(patched(dense, *stack))
    for name, expected in outputs(dense.model).items():
        assert error_by_effect(actual[name], expected, without[name]) < limit(models.format_name)


@in_dynamic_vram
def test_the_delegate_without_dynamic_vram_is_packed_and_patched(models):
    lora = lora_for(models.values)
    patcher = patched(models.packed, (lora, 1.0))
    expected = run(patched(models.dense, (lora, 1.0)))
    run(patcher)
    delegate = patcher.get_non_dynamic_delegate()
    assert isinstance(delegate, PackedPatcher) and not delegate.is_dynamic()
    assert delegate.model is not models.packed.model
    assert models.is_right(run(delegate), expected)
    assert len(packed_layers(delegate)) == models.count
    assert patcher.get_non_dynamic_delegate().model is delegate.model
    assert models.is_right(run(patcher), expected)


@pytest.mark.fake_gpus(dynamic=True)
def test_integers_of_the_hosts_formats_are_saved_as_they_are(one_thread):
    patcher = packed_flux("int8_tensorwise")
    run(patcher)
    saved = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    for part, value in layer.weight.state_dict("weight").items():
        assert torch.equal(saved[f"single_blocks.0.linear2.{part}"].to("cpu"), value)
    assert "single_blocks.0.linear2.comfy_quant" in saved
