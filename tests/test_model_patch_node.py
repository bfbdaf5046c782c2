"""Load Model Patch (Featherweight), from a file in the model folders to the host's own nodes."""
import os

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from families import FAMILIES, shrunken_detection
from gpu_memory import lies_on
from model_folders import use_empty_folders
from model_patches import KINDS, packed_layers, sample, shrink, z_image_fun_3
from packed_files import write_q8_0

from featherweight.loaders.files.container import WeightFileError
from featherweight.nodes import node_text
from featherweight.nodes.load_model_patch import LoadModelPatch

KIND = KINDS["Z-Image Fun 2.0 lite"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder of model patches, with net.gguf in it."""
    use_empty_folders(tmp_path, monkeypatch)
    shrink(monkeypatch)
    shrunken_detection(FAMILIES["z-image"], monkeypatch)
    write_q8_0(tmp_path / "model_patches" / "net.gguf", z_image_fun_3())
    return tmp_path / "model_patches"


def test_files_and_folders_of_model_patches_are_listed(folder):
    for name, model_class in (("fun", "ZImageControlNetModel"), ("vae", "AutoencoderKL")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"_class_name": "{model_class}"}}')
        (folder / name / "weights.safetensors").touch()
    inputs = LoadModelPatch.define_schema().inputs[0]
    assert inputs.options == ["net.gguf", "fun/weights.safetensors", "vae/weights.safetensors",
                              "fun"]
    assert LoadModelPatch.validate_inputs("net.gguf") is True
    assert "gone.gguf is in none of the model folders" in LoadModelPatch.validate_inputs(
        "gone.gguf")


def test_node_gives_a_packed_model_patch_and_says_what_it_holds(folder, monkeypatch, small_models):
    texts = []
    monkeypatch.setattr(node_text, "show_text", texts.append)
    patch, = LoadModelPatch.execute("net.gguf").result
    assert isinstance(patch, comfy.model_patcher.ModelPatcher) and packed_layers(patch)
    assert texts[-1].startswith("Q8_0 + F32, ") and "held, dequantised by" in texts[-1]


def test_node_refuses_a_missing_file(folder):
    with pytest.raises(WeightFileError, match="gone.gguf is in none of the model folders"):
        LoadModelPatch.execute("gone.gguf")


@pytest.mark.fake_gpus
def test_on_a_gpu_its_bytes_are_counted_and_freed(folder, small_models):
    patch, = LoadModelPatch.execute("net.gguf").result
    expected = sample(KIND, patch)
    assert patch.load_device.type == "cuda"
    assert lies_on(patch.model) == patch.loaded_size() == patch.model_size()
    assert packed_layers(patch)
    patch.partially_unload(torch.device("cpu"), patch.model_size() // 2)
    assert lies_on(patch.model) == patch.loaded_size() < patch.model_size()
    assert torch.equal(sample(KIND, patch), expected)
    comfy.model_management.unload_all_models()
    assert lies_on(patch.model) == 0
    sample(KIND, patch)
    with open(folder / "net.gguf", "r+b") as file:
        file.write(b"GGUF")
    os.utime(folder / "net.gguf", ns=(0, 0))
    with pytest.raises(WeightFileError, match="net.gguf was written to after it was loaded"):
        sample(KIND, patch)
    assert lies_on(patch.model) == 0


@pytest.mark.fake_gpus(dynamic=True)
def test_in_dynamic_vram_it_acts_as_on_a_cpu(folder, small_models):
    patch, = LoadModelPatch.execute("net.gguf").result
    assert patch.is_dynamic()
    expected = sample(KIND, patch)
    assert packed_layers(patch)
    assert torch.equal(sample(KIND, patch), expected)
