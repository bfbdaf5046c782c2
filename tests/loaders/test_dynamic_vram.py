"""The loaders' switch that keeps a model out of dynamic VRAM, on a host that has it on.

As on a GPU the host makes dynamic patchers here. What is loaded runs in those kept out, on a device that is not "the CPU".
"""
import comfy.model_management
import comfy.model_patcher
import comfy_aimdo.host_buffer
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcherDynamic
from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from families import FAMILIES, random_weights
from featherweight.loaders import folders
from featherweight.nodes.load_checkpoint import LoadCheckpoint
from featherweight.nodes.load_diffusion_model import LoadDiffusionModel
from featherweight.nodes.load_text_encoder import LoadTextEncoder
from featherweight.ops.patcher import PackedPatcher
from patched_models import flux_file, flux_inputs, forward, packed_layers
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("small_models")

GPU = torch.device("cpu:0")
CLIP_L = ("clip_l.gguf", "stable_diffusion")
# The node, its arguments, which of its outputs is looked at.
LOADS = {
    "diffusion model": (LoadDiffusionModel, ("flux.gguf",), 0),
    "diffusion model of the host": (LoadDiffusionModel, ("flux.safetensors",), 0),
    "checkpoint": (LoadCheckpoint, ("flux.gguf",), 0),
    "model of a checkpoint": (LoadCheckpoint, ("checkpoint.gguf",), 0),
    "text encoder of a checkpoint": (LoadCheckpoint, ("checkpoint.gguf",), 1),
    "model of a checkpoint of the host": (LoadCheckpoint, ("checkpoint.safetensors",), 0),
    "text encoder of a checkpoint of the host": (LoadCheckpoint, ("checkpoint.safetensors",), 1),
    "text encoder": (LoadTextEncoder, CLIP_L, 0),
    "text encoder of the host": (LoadTextEncoder, ("clip_l.safetensors", "stable_diffusion"), 0),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with each file of LOADS."""
    folder = tmp_path_factory.mktemp("models")
    path, values = flux_file("Q8_0")
    (folder / "flux.gguf").symlink_to(path)
    save_file(values, folder / "flux.safetensors")
    shapes = tiny_models.clip_l_shapes()
    write_random_gguf(folder / "clip_l.gguf", shapes, "Q8_0")
    encoder = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(encoder, folder / "clip_l.safetensors")
    parts = {f"model.diffusion_model.{name}": value for name, value in random_weights(FAMILIES["sd1.5"]).items()}
    parts |= {f"cond_stage_model.transformer.{name}": value for name, value in encoder.items()}
    save_file(parts, folder / "checkpoint.safetensors")
    write_random_gguf(folder / "checkpoint.gguf", {name: value.shape for name, value in parts.items()}, "Q8_0", None)
    return folder


@pytest.fixture
def in_folder(models, monkeypatch):
    table = {key: ([str(models)], set(folder_paths.supported_pt_extensions))
             for key in (*folders.GGUF_FOLDERS.values(), "checkpoints", "diffusers", "embeddings")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register_folders()


@pytest.fixture
def dynamic_vram(in_folder, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: GPU)
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: GPU)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcherDynamic)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *args: None)  # pinned memory: none on a CPU


def loaded(load: str, **options):
    """What a node gives, and its patcher."""
    node, arguments, index = LOADS[load]
    output = node.execute(*arguments, **options)[index]
    return output, getattr(output, "patcher", output)


@pytest.mark.parametrize("load", LOADS)
def test_the_switch_keeps_a_model_and_what_is_made_of_it_out_of_dynamic_vram(load, dynamic_vram):
    assert loaded(load)[1].is_dynamic()
    _, patcher = loaded(load, disable_dynamic_vram=True)
    for found in (patcher, patcher.clone(), patcher.deepclone_multigpu(GPU)):
        assert not found.is_dynamic()
        assert isinstance(found, PackedPatcher) == bool(packed_layers(found)) == ("host" not in load)
    function, arguments, *which = patcher.cached_patcher_init
    again = function(*arguments)
    assert not (again[which[0]] if which else again).is_dynamic()


def test_a_model_kept_out_gives_what_it_gives_without_dynamic_vram(in_folder, request):
    def output():
        _, patcher = loaded("diffusion model", disable_dynamic_vram=True)
        comfy.model_management.load_models_gpu([patcher])
        return forward(patcher, {name: value.to(patcher.load_device) for name, value in flux_inputs().items()})

    without = output()
    request.getfixturevalue("dynamic_vram")
    assert torch.equal(output(), without)


def test_a_text_encoder_kept_out_gives_what_it_gives_without_dynamic_vram(in_folder, request):
    def output():
        clip, _ = loaded("text encoder", disable_dynamic_vram=True)
        return clip.encode_from_tokens(clip.tokenize("a cloud"))

    without = output()
    request.getfixturevalue("dynamic_vram")
    assert torch.equal(output(), without)
