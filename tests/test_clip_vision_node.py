"""Load CLIP Vision (Featherweight), from a file in the model folders to the host's own nodes."""
import comfy.clip_vision
import comfy.model_management
import pytest
import torch
from families import relative_error
from gpu_memory import lies_on
from host_nodes import seeded
from model_folders import use_empty_folders
from packed_files import write_q8_0
from safetensors.torch import save_file
from vision_models import VISION_MODELS, packed_layers, shrink

import nodes as host_nodes
from featherweight.loaders.files.container import WeightFileError
from featherweight.nodes import node_text
from featherweight.nodes.load_clip_vision import LoadCLIPVision


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder of CLIP vision models, with net.gguf in it."""
    use_empty_folders(tmp_path, monkeypatch)
    shrink(monkeypatch)
    seen = write_q8_0(tmp_path / "clip_vision" / "net.gguf", VISION_MODELS["CLIP H"]())
    save_file({name: value.contiguous() for name, value in seen.items()},
              tmp_path / "dense.safetensors")
    return tmp_path / "clip_vision"


def see(clip_vision) -> torch.Tensor:
    """What the host's node makes of a picture."""
    picture = seeded(1, 64, 64, 3, seed=9).abs() % 1
    with torch.inference_mode():
        return host_nodes.CLIPVisionEncode().encode(clip_vision, picture, "center")[0].image_embeds


def test_files_and_folders_of_vision_models_are_listed(folder):
    for name, model_class in (("h", "CLIPVisionModelWithProjection"), ("clip", "CLIPTextModel")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"architectures": ["{model_class}"]}}')
        (folder / name / "model.safetensors").touch()
    inputs = LoadCLIPVision.define_schema().inputs[0]
    assert inputs.options == ["net.gguf", "clip/model.safetensors", "h/model.safetensors", "h"]
    assert LoadCLIPVision.validate_inputs("net.gguf") is True
    assert "gone.gguf is in none of the model folders" in LoadCLIPVision.validate_inputs(
        "gone.gguf")


def test_node_gives_a_packed_model_and_says_what_it_holds(folder, monkeypatch, small_models):
    texts = []
    monkeypatch.setattr(node_text, "show_text", texts.append)
    clip_vision, = LoadCLIPVision.execute("net.gguf").result
    assert isinstance(clip_vision, comfy.clip_vision.ClipVisionModel) and packed_layers(clip_vision)
    assert texts[-1].startswith("Q8_0 + F32, ") and "held, dequantised by" in texts[-1]


def test_node_refuses_a_missing_file(folder):
    with pytest.raises(WeightFileError, match="gone.gguf is in none of the model folders"):
        LoadCLIPVision.execute("gone.gguf")


@pytest.mark.fake_gpus
def test_on_a_gpu_its_bytes_are_counted_and_freed(folder, small_models):
    clip_vision, = LoadCLIPVision.execute("net.gguf").result
    expected, patcher = see(clip_vision), clip_vision.patcher
    assert patcher.load_device.type == "cuda"
    assert lies_on(patcher.model) == patcher.loaded_size() == patcher.model_size()
    assert packed_layers(clip_vision)
    patcher.partially_unload(torch.device("cpu"), patcher.model_size() // 2)
    assert lies_on(patcher.model) == patcher.loaded_size() < patcher.model_size()
    assert torch.equal(see(clip_vision), expected)
    comfy.model_management.unload_all_models()
    assert lies_on(patcher.model) == 0


@pytest.mark.fake_gpus(dynamic=True)
def test_in_dynamic_vram_it_sees_what_its_dense_self_does(folder, small_models):
    clip_vision, = LoadCLIPVision.execute("net.gguf").result
    assert clip_vision.patcher.is_dynamic()
    expected = see(clip_vision)
    assert packed_layers(clip_vision)
    assert torch.equal(see(clip_vision), expected)
    dense = comfy.clip_vision.load(str(folder.parent / "dense.safetensors"))
    assert relative_error(expected, see(dense)) < 1e-5
