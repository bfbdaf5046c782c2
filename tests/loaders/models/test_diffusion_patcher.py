"""A loaded model in the host's hands: copied, moved in part, patched and put away, with its weights
packed all along."""
import comfy.model_management
import comfy.sd
import pytest
import torch
from families import (
    FAMILIES,
    comfyui_gguf_style,
    deep_clone,
    host_patcher,
    inputs,
    random_weights,
    relative_error,
    run,
)

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.tensor.packed_layout import is_packed

FAMILY = FAMILIES["flux-schnell"]


pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Path of a small Flux in Q8_0, and the values in it."""
    path = str(tmp_path_factory.mktemp("flux") / "model.gguf")
    return path, write_gguf(path, random_weights(FAMILY), **comfyui_gguf_style())


@pytest.fixture
def path(file):
    return file[0]


@pytest.fixture
def dense(file):
    return host_patcher(file[1], FAMILY)


@pytest.fixture
def patcher(path):
    return load_diffusion_model(path)


def packed_bytes(patcher):
    """Layer -> packed bytes of its weight."""
    return {
        name: module.weight._qdata.clone()
        for name, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_packed(module.weight)
    }


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lora():
    """A LoRA for a double block's fused qkv and MLP and a single block's fused input, in kohya's
    names."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, rows, columns in (("double_blocks_0_img_attn_qkv", 768,
                                 256), ("double_blocks_0_txt_mlp_0", 1024, 256),
                                ("single_blocks_0_linear1", 1792, 256)):
        weights[f"lora_unet_{name}.lora_up.weight"] = (
            torch.randn(rows, 4, generator=generator) * 0.2
        )
        weights[f"lora_unet_{name}.lora_down.weight"] = (
            torch.randn(4, columns, generator=generator) * 0.2
        )
        weights[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    return weights


def with_lora(patcher):
    return comfy.sd.load_lora_for_models(patcher, None, lora(), 1.0, 0.0)[0]


def on_another_device(patcher):
    """Loads to a device object of its own, so that the host sees the model move although all of it
    is the CPU."""
    patcher.load_device = torch.device("cpu:0")
    return patcher


def load_in_part(patcher, share):
    budget = int(patcher.model_size() * share)
    comfy.model_management.unload_all_models()
    on_another_device(patcher).partially_load(patcher.load_device, budget)
    assert patcher.model.model_lowvram and patcher.model.model_loaded_weight_memory <= budget


def model_output(patcher):
    arguments = inputs(FAMILY)
    with torch.inference_mode():
        return patcher.model.apply_model(**arguments) - arguments["x"]


def test_deep_clone_has_packed_weights_of_its_own(patcher):
    clone = deep_clone(patcher)
    assert clone.model is not patcher.model
    assert same_bytes(packed_bytes(clone), packed_bytes(patcher)) and packed_bytes(patcher)
    assert torch.equal(run(clone, FAMILY), run(patcher, FAMILY))


def test_loading_and_unloading_again_and_again_changes_nothing(patcher):
    before, out = packed_bytes(patcher), run(patcher, FAMILY)
    for _ in range(2):
        comfy.model_management.unload_all_models()
        assert same_bytes(packed_bytes(patcher), before)
        assert torch.equal(run(on_another_device(patcher), FAMILY), out)
    assert same_bytes(packed_bytes(patcher), before)


def test_model_loaded_in_part_gives_the_same_numbers(patcher, dense):
    before = packed_bytes(patcher)
    load_in_part(patcher, 0.2)
    assert patcher.model.model_loaded_weight_memory > 0
    assert relative_error(model_output(patcher), run(dense, FAMILY)) < 1e-5
    assert same_bytes(packed_bytes(patcher), before)
    patcher.partially_unload(torch.device("cpu"), patcher.model_size())
    assert relative_error(model_output(patcher), run(dense, FAMILY)) < 1e-5
    patcher.detach()
    assert same_bytes(packed_bytes(patcher), before)


def test_host_loads_in_part_when_memory_is_short(patcher, dense, monkeypatch):
    before = packed_bytes(patcher)
    on_another_device(patcher)
    monkeypatch.setattr(comfy.model_management, "vram_state",
                        comfy.model_management.VRAMState.LOW_VRAM)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    free = int(patcher.model_size() * 0.7)
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device=None, torch_free_too=False:
        (free, 0) if torch_free_too else free)
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 0)
    comfy.model_management.load_models_gpu([patcher])
    monkeypatch.undo()
    assert patcher.model.model_lowvram
    assert relative_error(model_output(patcher), run(dense, FAMILY)) < 1e-5
    assert same_bytes(packed_bytes(patcher), before)


def test_a_lora_on_a_model_loaded_in_part_is_the_lora_on_dense_weights(patcher, dense):
    before = packed_bytes(patcher)
    without = run(patcher, FAMILY)
    expected = run(with_lora(dense), FAMILY)
    assert relative_error(without, expected) > 1e-2
    patched = with_lora(patcher)
    load_in_part(patched, 0.7)
    assert relative_error(model_output(patched), expected) < 1e-5
    patched.detach()
    assert same_bytes(packed_bytes(patcher), before)
    patcher.load_device = torch.device("cpu")
    assert torch.equal(run(patcher, FAMILY), without)
