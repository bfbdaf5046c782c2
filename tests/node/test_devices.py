"""Devices that a workflow names: taken where they are, and where they are not the default, with a
sentence on the node."""

import comfy.sd
import pytest
import torch
from checkpoint_parts import autoencoder, checkpoint_shapes
from encoders import ENCODERS
from encoders.encoder import hidden_states, random_weights, write_encoder
from model_folders import use_folder
from pack_api import is_packed, load_checkpoint, load_diffusion_model
from packed_weights import packed_weights, write_packed
from prompt_errors import input_errors
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders import devices
from featherweight.loaders.models.vae import load_vae
from featherweight.nodes import load_text_encoder

pytestmark = pytest.mark.fake_gpus

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """Name of a small text encoder in the host's folders, and small sizes for the host's own."""
    use_folder(tmp_path, monkeypatch)
    case = ENCODERS["clip-l"]
    write_encoder(tmp_path / "clip_l.gguf", case, random_weights(case))
    load = load_text_encoder.load_text_encoder
    monkeypatch.setattr(
        load_text_encoder,
        "load_text_encoder", lambda *args, model_options, **options: load(
            *args, model_options={**case.model_options, **model_options}, **options))
    return "clip_l.gguf"


NAMES = {
    "default": None, "cpu": CPU, "gpu:0": FIRST, "gpu:1": SECOND, "cuda:1": SECOND, "xpu:1": SECOND,
    "mps": FIRST
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_device_goes_by_the_hosts_name_and_by_torchs(name, expected):
    assert devices.find_device(name) == (expected, None)


@pytest.mark.parametrize("name", ["gpu:3", "cuda:7", "tpu:0", "gpu:one", "1"])
def test_a_device_that_is_not_here_is_the_default_one_and_that_is_said(name):
    device, note = devices.find_device(name)
    assert device is None
    assert note == (f"There is no device {name} here (found: gpu:0, gpu:1, gpu:2, cpu), so the"
                    " default one is used.")


@pytest.mark.parametrize(
    ("name", "expected"), [("default", FIRST), ("cpu", CPU), ("gpu:1", SECOND), ("gpu:5", FIRST)]
)
def test_a_text_encoder_is_encoded_with_where_its_node_says(name, expected, encoder, texts):
    clip, = load_text_encoder.LoadTextEncoder.execute(encoder, "stable_diffusion",
                                                      device=name).result
    assert clip.patcher.load_device == expected
    assert ("no device gpu:5" in texts[-1]) == (name == "gpu:5") and "in memory" in texts[-1]
    plain, = load_text_encoder.LoadTextEncoder.execute(encoder, "stable_diffusion",
                                                       device="cpu").result
    assert torch.equal(hidden_states(clip).cpu(), hidden_states(plain))


def test_a_node_offers_the_devices_there_are_and_takes_a_workflow_that_names_another(encoder):
    schema = load_text_encoder.LoadTextEncoder.GET_SCHEMA()
    device = next(input for input in schema.inputs if input.id == "device")
    assert device.options == ["default", "cpu", "gpu:0", "gpu:1", "gpu:2"]
    given = {"text_encoder_1": encoder, "device": "gpu:5"}
    assert input_errors("FeatherweightLoadTextEncoder", **given) == {}


@pytest.mark.parametrize("device", [None, CPU, SECOND])
def test_models_and_vaes_are_loaded_for_a_device_and_loaded_again_for_it(device, tmp_path):
    shapes = {
        name: value.shape
        for name, value in tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1).items()
    }
    write_random_gguf(tmp_path / "flux.gguf", shapes, "Q8_0")
    write_packed(tmp_path / "vae.gguf", packed_weights(autoencoder()))
    vae, on_the_cpu = (load_vae(str(tmp_path / "vae.gguf"), where) for where in (device, CPU))
    found = [
        load_diffusion_model(tmp_path / "flux.gguf", model_options=devices.device_options(device)),
        vae.patcher
    ]
    found += [patcher.cached_patcher_init[0]() for patcher in found]
    assert {patcher.load_device for patcher in found} == {device or FIRST}
    assert {patcher.offload_device for patcher in found} == {CPU}
    latent = torch.linspace(-1, 1, 16 * 16).reshape(1, 16, 4, 4)
    assert torch.equal(vae.decode(latent).cpu(), on_the_cpu.decode(latent))
    assert sum(map(is_packed, vae.first_stage_model.parameters())) > 30


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_the_parts_of_a_checkpoint_are_loaded_for_their_devices_and_loaded_again_for_them(
        suffix, tmp_path):
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "gguf":
        write_random_gguf(path, checkpoint_shapes(), "Q8_0", None)
    else:
        save_file({name: torch.zeros(shape, dtype=torch.float16)
                   for name, shape in checkpoint_shapes().items()}, path)
    model, clip, vae = load_checkpoint(str(path), device=SECOND, encoder_device=CPU)
    assert isinstance(vae, comfy.sd.VAE) and vae.device == SECOND
    parts = [model, clip.patcher, vae.patcher]
    for patchers in (parts, [patcher.cached_patcher_init[0]() for patcher in parts]):
        assert [patcher.load_device for patcher in patchers] == [SECOND, CPU, SECOND]
