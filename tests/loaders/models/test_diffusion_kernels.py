"""Whole models with convolutions in int8, as HSWQ writes SDXL and ControlNets, next to the host's
dense models of the same values."""
import random

import comfy.controlnet
import comfy.sd
import pytest
import torch
from checkpoint_parts import MODEL, SD15, VAE, stable_diffusion
from controlnets import KINDS, sample, shrunken_controlnet, unguided
from families import FAMILIES, host_patcher, random_weights, relative_error, run
from kernel_writer import write_unet
from pack_api import (
    AUTOMATIC,
    COMFYUI,
    EXACT,
    PackedLayer,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    source_of_file,
)
from patched_models import LIMIT, adapter, error_by_effect, kohya, patched
from safetensors.torch import save_file
from saving import save

from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.models.controlnet import load_controlnet

pytestmark = pytest.mark.usefixtures("small_models")
SDXL = FAMILIES["sdxl"]


def packed_kernels(module) -> int:
    return sum(isinstance(layer, PackedLayer) and is_packed(layer.weight) and layer.weight.ndim == 4
               for layer in module.modules())


@pytest.fixture(params=[True, False], ids=["rotated", "plain"])
def sdxl(request, tmp_path):
    """A file of the model, and its values."""
    stored, values = write_unet(random_weights(SDXL), request.param)
    path = str(tmp_path / "model.safetensors")
    save_file(stored, path)
    return path, values


@pytest.mark.parametrize("by", [EXACT, AUTOMATIC, COMFYUI])
def test_a_model_draws_what_its_dense_values_draw(by, sdxl):
    path, values = sdxl
    ours, dense = load_diffusion_model(path, host_formats=by), host_patcher(values, SDXL)
    kernels = sum(value.ndim == 4 for value in values.values())
    assert packed_kernels(ours.model) == kernels > 5
    # ComfyUI's product of its linear layers quantises their inputs
    assert relative_error(run(ours, SDXL), run(dense, SDXL)) < (0.05 if by == COMFYUI else 1e-5)


@pytest.mark.parametrize(("kind", "sdxl"), [
    ("lora", True), ("locon", False), ("dora", True), ("loha", False), ("diff", True)],
    indirect=["sdxl"])
def test_loras_on_convolutions_are_exact(kind, sdxl):
    path, values = sdxl
    lora = {f"{kohya(name.removesuffix('.weight'))}.{suffix}": tensor
            for seed, (name, value) in enumerate(values.items())
            if value.ndim == 4 and name.startswith(("input_blocks", "middle_block"))
            for suffix, tensor in adapter(kind, value, seed).items()}
    ours, dense = load_diffusion_model(path), host_patcher(values, SDXL)
    expected = run(patched(dense, (lora, 0.7)), SDXL)
    actual = run(patched(ours, (lora, 0.7)), SDXL)
    assert error_by_effect(actual, expected, run(dense, SDXL)) < LIMIT


def test_a_checkpoint_has_them_in_its_model_and_its_vae(tmp_path):
    weights = stable_diffusion()
    chosen = {name: value for name, value in weights.items() if name.startswith(MODEL) or (
        name.startswith(VAE) and value.ndim == 4)}
    stored, values = write_unet(chosen)
    path = str(tmp_path / "checkpoint.safetensors")
    save_file({name: value.contiguous() for name, value in (
        {name: value for name, value in weights.items() if name not in chosen} | stored).items()},
        path)
    model, _, vae = load_checkpoint(path)
    expected, _, expected_vae, *_ = comfy.sd.load_state_dict_guess_config(
        {name: value.clone() for name, value in (weights | values).items()})
    assert packed_kernels(model.model) and packed_kernels(vae.first_stage_model)
    assert relative_error(run(model, SD15), run(expected, SD15)) < 1e-5
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert relative_error(vae.decode(latent), expected_vae.decode(latent)) < 1e-3


@pytest.mark.parametrize("kind", ["sd1.5 with a prefix", "sdxl", "sd3 of diffusers"])
def test_a_controlnet_guides_as_its_dense_weights_do(kind, tmp_path, monkeypatch):
    kind, compute = KINDS[kind], random.choice(["automatic", "exact"])
    shrunken_controlnet(kind, monkeypatch)
    stored, values = write_unet(kind.weights())
    path, dense = tmp_path / "net.safetensors", tmp_path / "dense.safetensors"
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    save_file({name: value.contiguous() for name, value in values.items()}, dense)
    packed = load_controlnet(str(path), compute=compute)
    expected = sample(kind, comfy.controlnet.load_controlnet(str(dense)))
    assert packed_kernels(packed.control_model) >= 2
    assert relative_error(unguided(kind.base), expected) > 1e-3
    assert relative_error(sample(kind, packed), expected) < 1e-5


def test_inspect_names_them(sdxl):
    inspection, = inspect(sdxl[0])
    text = inspection_text(inspection)
    assert "int8_" in text.lower() and "TAPS" not in text, text


@pytest.mark.parametrize("wanted", ["Q8_0", "int8_convrot"])
def test_they_are_packed_anew_from_their_values(wanted, sdxl, tmp_path):
    """In a file that is saved, and as their own file is loaded."""
    path, values = sdxl
    target = tmp_path / ("saved.gguf" if wanted == "Q8_0" else "saved.safetensors")
    save(source_of_file(path), str(target), wanted)
    expected = run(host_patcher(values, SDXL), SDXL)
    for again in load_diffusion_model(str(target)), load_diffusion_model(path, pack_to=wanted):
        assert packed_kernels(again.model) or wanted != "Q8_0"
        assert relative_error(run(again, SDXL), expected) < 0.05
