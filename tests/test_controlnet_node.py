"""Load ControlNet (Featherweight), from a file in the model folders to the host's own nodes."""
import comfy.controlnet
import comfy.model_management
import pytest
import torch
from controlnets import KINDS, flux_bfl, packed_layers, sample
from gpu_memory import lies_on
from model_folders import use_empty_folders
from packed_files import write_q8_0
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.nodes import node_text
from featherweight.nodes.load_controlnet import LoadControlNet

KIND = KINDS["flux"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder of ControlNets, with net.gguf in it."""
    use_empty_folders(tmp_path, monkeypatch)
    write_q8_0(tmp_path / "controlnet" / "net.gguf", flux_bfl())
    return tmp_path / "controlnet"


def options() -> list[str]:
    return LoadControlNet.define_schema().inputs[0].options


def test_files_and_folders_of_controlnets_are_listed(folder):
    for name, model_class in (("flux", "FluxControlNetModel"), ("vae", "AutoencoderKL")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"_class_name": "{model_class}"}}')
        (folder / name / "weights.safetensors").touch()
    assert options() == ["net.gguf", "flux/weights.safetensors", "vae/weights.safetensors", "flux"]
    assert LoadControlNet.validate_inputs("net.gguf") is True
    message = LoadControlNet.validate_inputs("gone.gguf")
    assert "gone.gguf is in none of the model folders" in message


def test_node_gives_a_packed_controlnet_and_says_what_it_holds(folder, monkeypatch, small_models):
    texts = []
    monkeypatch.setattr(node_text, "show_text", texts.append)
    control_net, = LoadControlNet.execute("net.gguf").result
    assert isinstance(control_net, comfy.controlnet.ControlNet) and packed_layers(control_net)
    assert texts[-1].startswith("Q8_0 + F32, ") and "held, dequantised by" in texts[-1]


def test_node_packs_a_controlnet_as_it_reads_it(folder, monkeypatch, small_models):
    texts = []
    monkeypatch.setattr(node_text, "show_text", texts.append)
    save_file({name: value.contiguous() for name, value in flux_bfl().items()},
              folder / "net.safetensors")
    control_net, = LoadControlNet.execute("net.safetensors", "Q8_0").result
    assert packed_layers(control_net)
    assert texts[-1].startswith("Q8_0 + ") and "held, packed from F32 in" in texts[-1]


def test_node_refuses_a_missing_file(folder):
    with pytest.raises(WeightFileError, match="gone.gguf is in none of the model folders"):
        LoadControlNet.execute("gone.gguf")


@pytest.mark.fake_gpus
def test_on_a_gpu_its_bytes_are_counted_and_freed(folder, small_models):
    control_net, = LoadControlNet.execute("net.gguf").result
    expected, patcher = sample(KIND, control_net), control_net.control_model_wrapped
    assert patcher.load_device.type == "cuda"
    assert lies_on(patcher.model) == patcher.loaded_size() == patcher.model_size()
    assert packed_layers(control_net)
    patcher.partially_unload(torch.device("cpu"), patcher.model_size() // 2)
    assert lies_on(patcher.model) == patcher.loaded_size() < patcher.model_size()
    assert torch.equal(sample(KIND, control_net), expected)
    comfy.model_management.unload_all_models()
    assert lies_on(patcher.model) == 0


@pytest.mark.fake_gpus(dynamic=True)
def test_in_dynamic_vram_it_guides_as_on_a_cpu(folder, small_models):
    control_net, = LoadControlNet.execute("net.gguf").result
    assert control_net.control_model_wrapped.is_dynamic()
    expected = sample(KIND, control_net)
    assert packed_layers(control_net)
    assert torch.equal(sample(KIND, control_net), expected)
