"""Model files with layers in the host's own quantised formats beside NF4, computed by the host."""
import contextlib
import functools
import itertools

import comfy.sd
import pytest
import torch
from host_formats import ASYMMETRIC, HOST_FORMATS, is_nf4, write_mixed
from pack_api import COMFYUI, QuantizedTensor, is_packed, load_diffusion_model
from patched_models import (
    LIMIT,
    Ledger,
    error_by_effect,
    kohya,
    lora_for,
    packed_layers,
    patched,
    relative,
    run,
    tiny_flux,
)

from featherweight.ops.patcher import PackedPatcher

pytest.importorskip("bitsandbytes", reason="it writes the files")

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(autouse=True, scope="module")
def no_model_outlives_its_tests():
    yield
    mixed_models.cache_clear()


@functools.cache
def mixed_models(format_name: str, folder) -> tuple:
    """(ours, the host's with NF4 dense and its own formats as they are, the host's all dense), and
    the dense values."""
    path = str(folder / f"{format_name}.safetensors")
    values, for_host = write_mixed(path, tiny_flux(), format_name)
    dense = {name: value.clone() for name, value in values.items()}
    host, dense = map(comfy.sd.load_diffusion_model_state_dict, (for_host, dense))
    return load_diffusion_model(path, host_formats=COMFYUI), host, dense, values


def codes(patcher) -> dict[str, torch.Tensor]:
    """Name -> codes of the quantised weights as they are now."""
    return {
        name: value._qdata.clone()
        for name, value in patcher.model.diffusion_model.state_dict().items()
        if isinstance(value, QuantizedTensor)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mixed")


@contextlib.contextmanager
def beside_the_product(patcher, lora, strength):
    """The host's model with a LoRA as branches beside its layers, in plain torch."""
    handles = []
    for name, module in patcher.model.diffusion_model.named_modules():
        up, down, alpha = (lora.get(f"{kohya(name)}.{part}")
                           for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up is not None:
            delta = strength * alpha / len(down) * up @ down
            handles.append(
                module.register_forward_hook(
                    lambda _, inputs, out, delta=delta: out + inputs[0] @ delta.T))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_layers_of_the_host_beside_nf4_run_as_in_the_host(format_name, folder):
    ours, host, _, values = mixed_models(format_name, folder)
    assert relative(run(ours), run(host)) < 1e-5
    layers = ours.model.diffusion_model
    for name, value in values.items():
        if value.ndim == 2:
            assert is_packed(layers.get_parameter(name)) == is_nf4(name)
            assert torch.equal(layers.get_parameter(name).dequantize(), value)


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_a_lora_is_added_to_the_hosts_own_product(format_name, folder):
    ours, host, _, values = mixed_models(format_name, folder)
    lora, without = lora_for(values), run(host)
    with beside_the_product(host, lora, 0.8):
        expected = run(host)
    # a difference of rounding in its input can change a code that the host makes of it
    limit = 0.01 if format_name == ASYMMETRIC else LIMIT
    assert error_by_effect(run(patched(ours, (lora, 0.8))), expected, without) < limit


@pytest.mark.parametrize(("kind", "format_name"), [
    *zip(itertools.cycle(["dora", "loha", "lokr", "diff", "set"]), HOST_FORMATS)])
def test_other_patches_run_on_the_float_values(kind, format_name, folder):
    ours, _, dense, values = mixed_models(format_name, folder)
    before, lora = codes(ours), lora_for(values, kind)
    expected = run(patched(dense, (lora, 0.8)))
    assert error_by_effect(run(patched(ours, (lora, 0.8))), expected, run(dense)) < LIMIT
    assert all(torch.equal(codes(ours)[name], before[name]) for name in before)


def test_a_switch_moves_and_copies_nothing(folder):
    ours, _, _, values = mixed_models("float8_e4m3fn", folder)
    patchers = [
        patched(ours, (lora_for(values, seed=seed), strength))
        for seed, strength in ((1, 1.0), (1, 0.5), (2, 0.7))
    ]
    run(ours)
    with Ledger(ours) as ledger:
        for patcher in (*patchers, ours):
            comfy.model_management.load_models_gpu([patcher])
    assert (ledger.moves, ledger.copies, ledger.kept) == (0, 0, True) and len(ledger.layers) == 19


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_saved_are_the_hosts_weights_as_they_were_and_patched_ones_dense(format_name, folder):
    ours, host, dense, values = mixed_models(format_name, folder)
    name = "single_blocks.0.linear2.weight"
    lora = lora_for({name: values[name]})
    saver, path = patched(ours, (lora, 1.0)), str(folder / "saved.safetensors")
    comfy.sd.save_checkpoint(path, saver)
    again = comfy.sd.load_diffusion_model(path)
    assert not isinstance(again, PackedPatcher)
    stored = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in comfy.utils.load_torch_file(path).items()
    }
    expected = patched(dense, (lora, 1.0)).patch_weight_to_device(
        f"diffusion_model.{name}", return_weight=True
    )
    assert torch.allclose(stored[name].float(), expected, atol=1e-6)
    assert not any(
        key.startswith(name.removesuffix("weight")) and not key.endswith(("weight", "bias"))
        for key in stored
    )
    for key in values.keys() - {name}:
        if values[key].ndim == 2:
            assert (f"{key.removesuffix('weight')}comfy_quant" in stored) == (not is_nf4(key))
    with beside_the_product(host, lora, 1.0):
        assert relative(run(again), run(host)) < 0.01
    assert len(packed_layers(ours)) == 19
