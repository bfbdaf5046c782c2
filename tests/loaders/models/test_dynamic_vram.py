"""The loaders' switch that keeps a model out of dynamic VRAM, on a host that has it on."""
import shutil

import pytest
import torch
from families import FAMILIES, random_weights
from model_folders import use_folder
from patched_models import flux_file, packed_layers, run
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.nodes.load_checkpoint import LoadCheckpoint
from featherweight.nodes.load_diffusion_model import LoadDiffusionModel
from featherweight.nodes.load_text_encoder import LoadTextEncoder
from featherweight.ops.patcher import PackedPatcher

pytestmark = [
    pytest.mark.fake_gpus(dynamic=True),
    pytest.mark.usefixtures("small_models", "in_folder")
]

OTHER_GPU = torch.device("cuda:1")
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
    shutil.copy(path, folder / "flux.gguf")
    save_file(values, folder / "flux.safetensors")
    shapes = tiny_models.clip_l_shapes()
    write_random_gguf(folder / "clip_l.gguf", shapes, "Q8_0")
    encoder = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(encoder, folder / "clip_l.safetensors")
    parts = {
        f"model.diffusion_model.{name}": value
        for name, value in random_weights(FAMILIES["sd1.5"]).items()
    }
    parts |= {f"cond_stage_model.transformer.{name}": value for name, value in encoder.items()}
    save_file(parts, folder / "checkpoint.safetensors")
    write_random_gguf(folder / "checkpoint.gguf",
                      {name: value.shape for name, value in parts.items()}, "Q8_0", None)
    return folder


@pytest.fixture
def in_folder(models, monkeypatch):
    use_folder(models, monkeypatch, "checkpoints")


def loaded(load: str, **options):
    """What a node gives, and its patcher."""
    node, arguments, index = LOADS[load]
    output = node.execute(*arguments, **options)[index]
    return output, getattr(output, "patcher", output)


@pytest.mark.parametrize("load", LOADS)
def test_the_switch_keeps_a_model_and_what_is_made_of_it_out_of_dynamic_vram(load):
    assert loaded(load)[1].is_dynamic()
    _, patcher = loaded(load, disable_dynamic_vram=True)
    for found in (patcher, patcher.clone(), patcher.deepclone_multigpu(OTHER_GPU)):
        assert not found.is_dynamic()
        assert (
            isinstance(found, PackedPatcher) == bool(packed_layers(found)) == ("host" not in load)
        )
    function, arguments, *which = patcher.cached_patcher_init
    again = function(*arguments)
    assert not (again[which[0]] if which else again).is_dynamic()


def test_a_model_kept_out_gives_what_it_gives_in_dynamic_vram():
    outputs = []
    for kept_out in (False, True):
        _, patcher = loaded("diffusion model", disable_dynamic_vram=kept_out)
        outputs.append(run(patcher))
        assert (
            all(layer.weight.device == patcher.load_device for layer in packed_layers(patcher))
            == kept_out
        )
    assert torch.equal(*outputs)


def test_a_text_encoder_kept_out_gives_what_it_gives_in_dynamic_vram():
    outputs = []
    for kept_out in (False, True):
        clip, patcher = loaded("text encoder", disable_dynamic_vram=kept_out)
        outputs.append(clip.encode_from_tokens(clip.tokenize("a cloud")))
        assert patcher.is_dynamic() != kept_out and patcher.loaded_size() > 0
    assert torch.equal(*outputs)
