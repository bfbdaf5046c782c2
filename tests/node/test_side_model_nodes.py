"""The loaders of ControlNets, model patches and CLIP vision models, from a file in the model
folders to the host's own nodes."""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.clip_vision
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import controlnets
import model_patches
import pytest
import torch
import vision_models
from families import FAMILIES, relative_error, shrunken_detection
from gpu_memory import lies_on
from host_nodes import seeded
from model_folders import use_empty_folders
from pack_api import WeightFileError
from packed_files import write_q8_0
from safetensors.torch import save_file

import nodes as host_nodes
from featherweight.nodes.load_side_models import LoadCLIPVision, LoadControlNet, LoadModelPatch


class Loader(NamedTuple):
    """A node that loads side models, and a model for it.

    Attributes:
        node: Its class.
        folder: The host's folder of such models.
        weights: Makes those of a model.
        type: Of its output.
        patcher: Output -> its patcher.
        packed: Output -> names of its packed layers.
        use: Output -> what a host's node makes with it.
        config: Of a folder that the node lists, as diffusers or transformers write it.
        other_config: Of one that it does not list.
    """

    node: type
    folder: str
    weights: Callable[[], dict[str, torch.Tensor]]
    type: type
    patcher: Callable[[Any], comfy.model_patcher.ModelPatcher]
    packed: Callable[[Any], list[str]]
    use: Callable[[Any], torch.Tensor]
    config: dict
    other_config: dict

    def load(self, *inputs):
        output, = self.node.execute(*inputs).result
        return output


def embed(clip_vision) -> torch.Tensor:
    """What the host's node makes of a picture."""
    picture = seeded(1, 64, 64, 3, seed=9).abs() % 1
    with torch.inference_mode():
        return host_nodes.CLIPVisionEncode().encode(clip_vision, picture, "center")[0].image_embeds


VAE = {"_class_name": "AutoencoderKL"}
LOADERS = {
    "ControlNet": Loader(
        LoadControlNet, "controlnet", controlnets.flux_bfl, comfy.controlnet.ControlNet,
        lambda control_net: control_net.control_model_wrapped,
        lambda control_net: controlnets.packed_layers(control_net.control_model),
        lambda control_net: controlnets.sample(controlnets.KINDS["flux"], control_net),
        {"_class_name": "FluxControlNetModel"}, VAE),
    "model patch": Loader(
        LoadModelPatch, "model_patches", model_patches.z_image_fun_3,
        comfy.model_patcher.ModelPatcher, lambda patch: patch,
        lambda patch: controlnets.packed_layers(patch.model),
        lambda patch: model_patches.sample(model_patches.KINDS["Z-Image Fun 2.0 lite"], patch),
        {"_class_name": "ZImageControlNetModel"}, VAE),
    "CLIP vision": Loader(
        LoadCLIPVision, "clip_vision", vision_models.VISION_MODELS["CLIP H"],
        comfy.clip_vision.ClipVisionModel, lambda clip_vision: clip_vision.patcher,
        lambda clip_vision: controlnets.packed_layers(clip_vision.model), embed,
        {"architectures": ["CLIPVisionModelWithProjection"]}, {"architectures": ["CLIPTextModel"]}),
}


@pytest.fixture(params=LOADERS)
def loader(request, monkeypatch) -> Loader:
    if request.param == "model patch":
        model_patches.shrink(monkeypatch)
        shrunken_detection(FAMILIES["z-image"], monkeypatch)
    if request.param == "CLIP vision":
        vision_models.shrink(monkeypatch)
    return LOADERS[request.param]


@pytest.fixture
def folder(loader, tmp_path, monkeypatch) -> Path:
    """The host's folder of such models, with net.gguf in it; the parent folder has its values in
    dense.safetensors."""
    use_empty_folders(tmp_path, monkeypatch)
    values = write_q8_0(tmp_path / loader.folder / "net.gguf", loader.weights())
    save_file({name: value.contiguous() for name, value in values.items()},
              tmp_path / "dense.safetensors")
    return tmp_path / loader.folder


def test_files_and_folders_are_listed(loader, folder):
    for name, config in (("listed", loader.config), ("other", loader.other_config)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "model.safetensors").touch()
    options = loader.node.define_schema().inputs[0].options
    files = [os.path.join(name, "model.safetensors") for name in ("listed", "other")]
    assert options == ["net.gguf", *files, "listed"]
    assert "listed\\model.safetensors" in options and "listed/model.safetensors" in options
    assert "gone.gguf" not in options


def test_a_packed_file_stays_packed_and_the_node_says_what_it_holds(
        loader, folder, texts, small_models):
    output = loader.load("net.gguf")
    assert isinstance(output, loader.type) and loader.packed(output)
    assert texts[-1].startswith("Q8_0 + F32, ") and "in memory, dequantized by" in texts[-1]


def test_a_dense_file_is_packed_as_it_is_read(loader, folder, texts, small_models):
    save_file({name: value.contiguous() for name, value in loader.weights().items()},
              folder / "net.safetensors")
    assert loader.packed(loader.load("net.safetensors", "Q8_0"))
    assert texts[-1].startswith("Q8_0 + ") and "in memory, packed from F32 in" in texts[-1]


@pytest.mark.fake_gpus
def test_on_a_gpu_its_bytes_are_counted_and_freed(loader, folder, small_models):
    output = loader.load("net.gguf")
    expected, patcher = loader.use(output), loader.patcher(output)
    assert patcher.load_device.type == "cuda"
    assert lies_on(patcher.model) == patcher.loaded_size() == patcher.model_size()
    assert loader.packed(output)
    patcher.partially_unload(torch.device("cpu"), patcher.model_size() // 2)
    assert lies_on(patcher.model) == patcher.loaded_size() < patcher.model_size()
    assert torch.equal(loader.use(output), expected)
    comfy.model_management.unload_all_models()
    assert lies_on(patcher.model) == 0
    loader.use(output)
    with open(folder / "net.gguf", "r+b") as file:
        file.write(b"GGUF")
    os.utime(folder / "net.gguf", ns=(0, 0))
    with pytest.raises(WeightFileError, match="net.gguf was written to after it was loaded"):
        loader.use(output)
    assert lies_on(patcher.model) == 0


@pytest.mark.fake_gpus(dynamic=True)
def test_in_dynamic_vram_it_stays_packed_and_gives_the_same_again(loader, folder, small_models):
    output = loader.load("net.gguf")
    assert loader.patcher(output).is_dynamic()
    expected = loader.use(output)
    assert loader.packed(output)
    assert torch.equal(loader.use(output), expected)
    if loader.folder == "clip_vision":
        dense = comfy.clip_vision.load(str(folder.parent / "dense.safetensors"))
        assert relative_error(expected, loader.use(dense)) < 1e-5
