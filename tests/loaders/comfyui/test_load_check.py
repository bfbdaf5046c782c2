"""What a model misses of its file, and what of the file it does not use, is told or refused."""
import concurrent.futures
import dataclasses
import random

import comfy.sd
import pytest
import torch
from checkpoint_parts import autoencoder, clip_l, stable_diffusion
from controlnets import flux_bfl
from encoders import ENCODERS
from encoders.encoder import TOWERS, load_encoder, small_towers, write_encoder
from encoders.encoder import random_weights as encoder_weights
from families import FAMILIES, random_weights, shrunken_detection
from host_formats import in_host_format
from pack_api import (
    WeightFileError,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    load_notes,
    load_text_encoder,
    product,
)
from patched_models import relative, run, tiny_flux
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.load_check import check_load, patcher_of
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.vae import load_vae
from featherweight.loaders.refusals.read_anyway import VARIABLE

pytestmark = pytest.mark.usefixtures("small_models")

WEIGHT = "double_blocks.0.img_mlp.0.weight"
BIAS = "double_blocks.0.img_mlp.0.bias"
NORM = "single_blocks.0.norm.query_norm.scale"


def safetensors(path, weights):
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)
    return str(path)


def gguf(path, weights):
    path = path.with_suffix(".gguf")
    write_gguf(path, weights, lambda name, values: "Q8_0" if values.ndim == 2 else "F32")
    return str(path)


WRITERS = [safetensors, gguf]
writers = pytest.mark.parametrize("write", WRITERS)


def value(patcher, name: str) -> torch.Tensor:
    weight = patcher.model.diffusion_model.state_dict()[name]
    return product.dequantize(weight, torch.float32) if is_packed(weight) else weight


@writers
def test_a_whole_file_has_no_notes(write, tmp_path):
    assert load_notes(load_diffusion_model(write(tmp_path / "a.safetensors", tiny_flux()))) == ()


@pytest.fixture
def read_anyway(monkeypatch):
    """As version 0.2.2 did."""
    monkeypatch.setenv(VARIABLE, "1")


@writers
def test_a_missing_weight_stops_the_load(write, tmp_path):
    weights = dict(tiny_flux())
    name = random.choice([name for name in weights if "blocks" in name and "key_norm" not in name])
    del weights[name]
    with pytest.raises(WeightFileError, match=(
            rf"^a.* lacks weights of the model: '{name.removesuffix('.scale')}.*'. Download the"
            rf" file again, or get another conversion. {VARIABLE}=1 in the environment")):
        load_diffusion_model(write(tmp_path / "a.safetensors", weights))


@writers
@pytest.mark.parametrize("name", [WEIGHT, BIAS])
def test_a_missing_weight_that_is_read_anyway_is_zeros_and_told(name, write, tmp_path, read_anyway):
    weights = dict(tiny_flux())
    del weights[name]
    patcher = load_diffusion_model(write(tmp_path / "a.safetensors", weights))
    assert not value(patcher, name).any() and run(patcher).isfinite().all()
    assert load_notes(patcher)[0].startswith(
        f"a.{'gguf' if write is gguf else 'safetensors'} lacks weights of the model: {name!r}"
        " is zeros")


@writers
def test_a_missing_scale_of_a_norm_that_is_read_anyway_is_ones_and_told(write, tmp_path,
                                                                        read_anyway):
    weights = {name: tensor for name, tensor in tiny_flux().items() if name != NORM}
    patcher = load_diffusion_model(write(tmp_path / "a.safetensors", weights))
    loaded = dict(patcher.model.diffusion_model.single_blocks[0].norm.query_norm.named_parameters())
    assert all((tensor == 1).all() for tensor in loaded.values())
    note, = load_notes(patcher)
    assert "query_norm" in note and "ones where it scales" in note


@writers
def test_a_tensor_that_the_model_has_not_is_told(write, tmp_path):
    weights = tiny_flux() | {"double_blocks.0.mystery": torch.ones(3)}
    patcher = load_diffusion_model(write(tmp_path / "a.safetensors", weights))
    assert load_notes(patcher) == (
        "The model does not use 'double_blocks.0.mystery' of"
        f" a.{'gguf' if write is gguf else 'safetensors'}.",)


@writers
def test_missing_and_unused_together_stop_the_load(write, tmp_path):
    weights = dict(tiny_flux())
    weights["double_blocks.0.img_mlp_0_weight"] = weights.pop(WEIGHT)
    with pytest.raises(WeightFileError, match="makes only a part of the model: it has no"
                                              f" {WEIGHT!r}, and the model has no 'double_blocks.0."
                                              "img_mlp_0_weight'"):
        load_diffusion_model(write(tmp_path / "a.safetensors", weights))


@pytest.mark.parametrize(("load", "weights"), [
    (load_diffusion_model, lambda: tiny_models.flux(
        0, hidden=256, double_blocks=1, single_blocks=1, context=256, pooled_text=True)),
    (load_controlnet, flux_bfl),
], ids=["model", "ControlNet"])
def test_a_weight_that_takes_a_part_of_the_pooled_text_is_told(load, weights, tmp_path):
    name, weights = "vector_in.in_layer.weight", dict(weights())
    assert load_notes(patcher_of(load(gguf(tmp_path / "whole.gguf", weights)))) == ()
    weights[name] = weights[name][:, :384]
    note, = load_notes(patcher_of(load(gguf(tmp_path / "cut.gguf", weights))))
    assert f"{name!r} of cut.gguf takes 384 values of the pooled text, expected 768" in note


@writers
def test_weights_of_zeros_are_told(write, tmp_path):
    weights = tiny_flux() | {WEIGHT: torch.zeros_like(tiny_flux()[WEIGHT])}
    notes = load_notes(load_diffusion_model(write(tmp_path / "a.safetensors", weights)))
    assert len(notes) == 1 and f": {WEIGHT!r} holds nothing but zeros" in notes[0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_their_scales_stop_the_load(dtype, tmp_path):
    weights = dict(tiny_flux())
    for name, tensor in weights.items():
        if tensor.ndim == 2 and "blocks" in name:
            weights[name] = (tensor / tensor.abs().max() * 100).to(dtype)
    with pytest.raises(WeightFileError, match="holds codes without their scales, and so do"):
        load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights))


@pytest.mark.parametrize(("name", "dtype"), [
    (BIAS, torch.int32), (NORM, torch.bool), ("img_in.weight", torch.int64)])
def test_whole_numbers_as_weights_stop_the_load(name, dtype, tmp_path):
    weights = tiny_flux() | {name: tiny_flux()[name].to(dtype)}
    with pytest.raises(WeightFileError, match="expected floats"):
        load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights))


def test_plain_fp8_without_scales_is_a_model(tmp_path):
    weights = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
               for name, tensor in tiny_flux().items()}
    patcher = load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights))
    assert load_notes(patcher) == () and is_packed(
        patcher.model.diffusion_model.get_parameter(WEIGHT))
    assert relative(value(patcher, WEIGHT), weights[WEIGHT].float()) < 1e-6
    dense = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.float() for name, tensor in weights.items()})
    assert relative(run(patcher), run(dense)) < 1e-5


def test_a_scale_of_inputs_needs_no_use(tmp_path):
    weights = dict(tiny_flux())
    parts, _ = in_host_format(WEIGHT, weights.pop(WEIGHT), "float8_e4m3fn")
    weights |= parts | {WEIGHT.replace("weight", "input_scale"): torch.ones(())}
    assert load_notes(load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights))) == ()


@writers
@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model."])
def test_parts_of_a_checkpoint_are_checked(part, write, tmp_path):
    weights = dict(stable_diffusion())
    name = next(name for name in weights if name.startswith(part) and name.endswith(".bias"))
    del weights[name]
    with pytest.raises(WeightFileError, match=f"lacks .*: '{name.removeprefix(part)}'"):
        load_checkpoint(write(tmp_path / "a.safetensors", weights))


@writers
def test_a_vae_is_checked(write, tmp_path):
    vae = dict(autoencoder())
    name = next(name for name in vae if name.endswith(".bias"))
    del vae[name]
    vae["mystery"] = torch.ones(2)
    with pytest.raises(WeightFileError, match=f"it has no .*{name}.*the model has no 'mystery'"):
        load_vae(write(tmp_path / "a.safetensors", vae))
    del vae["mystery"]
    with pytest.raises(WeightFileError, match=f"lacks weights of the model: {name!r}"):
        load_vae(write(tmp_path / "a.safetensors", vae))


@writers
def test_an_encoder_is_checked(write, tmp_path):
    weights = {name.removeprefix("transformer."): tensor for name, tensor in clip_l().items()}
    assert load_notes(load_text_encoder([write(tmp_path / "a.safetensors", weights)]).patcher) == ()
    del weights["text_model.encoder.layers.3.mlp.fc1.bias"]
    with pytest.raises(WeightFileError, match="lacks .*: 'text_model.encoder.layers.3.mlp.fc1.b"):
        load_text_encoder([write(tmp_path / "a.safetensors", weights)])


def test_memory_that_nothing_initialises_is_never_a_weight(tmp_path, read_anyway):
    """By the host, whose layers leave what they do not find as it was in memory."""
    weights = random_weights(FAMILIES["sd1.5"])
    for name in ("time_embed.0.bias", "input_blocks.1.0.in_layers.0.bias", "out.2.weight"):
        stored = {key: tensor for key, tensor in weights.items() if key != name}
        patcher = load_diffusion_model(safetensors(tmp_path / f"{name}.safetensors", stored))
        assert len(value(patcher, name).unique()) == 1 and name in load_notes(patcher)[0]


def test_a_load_sees_what_its_thread_builds(read_anyway):
    def build():
        return comfy.sd.load_diffusion_model_state_dict(dict(tiny_flux()))

    with concurrent.futures.ThreadPoolExecutor(1) as pool, check_load("a") as check:
        weights = dict(tiny_flux())
        del weights[BIAS]
        pool.submit(build).result()
        check.attach(patcher := comfy.sd.load_diffusion_model_state_dict(weights))
    assert BIAS in load_notes(patcher)[0] and len(load_notes(patcher)) == 1


def test_a_module_at_the_address_of_a_dead_one_is_watched():
    with check_load("a"):
        for _ in range(50):
            built = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
            assert built._load_state_dict_pre_hooks and built[1]._load_state_dict_pre_hooks
            del built


@pytest.mark.parametrize("name", [name for name, one in ENCODERS.items() if not one.unusable])
def test_a_whole_encoder_has_no_notes(name, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        write_encoder(tmp_path / "a.gguf", encoder, encoder_weights(encoder))
        clip = load_encoder(tmp_path / "a.gguf", encoder)
    assert all("nothing but zeros" in note or any(marker in note for marker in encoder.markers)
               for note in load_notes(clip.patcher))  # the markers are zeros


@pytest.mark.parametrize(("name", "part"), [("pixart-sigma", "scale_shift_table")])
def test_a_weight_that_comfyui_begins_with_random_values_stops_the_load(name, part, tmp_path,
                                                                        monkeypatch):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    weights = dict(random_weights(family))
    lost = random.choice([key for key in weights if key.endswith(part)])
    del weights[lost]
    with pytest.raises(WeightFileError, match=f"lacks weights of the model: '{lost}'"):
        load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights))


def test_what_comfyui_computes_may_be_missing_and_is_told(tmp_path, monkeypatch):
    family = FAMILIES["pixart-sigma"]
    shrunken_detection(family, monkeypatch)
    weights = dict(random_weights(family))
    del weights["y_embedder.y_embedding"]  # of the model that is guided without a text
    note, = load_notes(load_diffusion_model(safetensors(tmp_path / "a.safetensors", weights)))
    assert note.endswith("has no 'y_embedder.y_embedding': ComfyUI's initial values are used.")


@writers
def test_a_vae_that_only_decodes_loads_and_says_so(write, tmp_path):
    half = {name: tensor for name, tensor in autoencoder().items() if "encoder" not in name}
    note, = load_notes(load_vae(write(tmp_path / "a.safetensors", half)).patcher)
    assert "only the half of a VAE that decodes, and cannot encode" in note
    lost = random.choice([name for name in autoencoder() if "encoder" in name])
    rest = {name: tensor for name, tensor in autoencoder().items() if name != lost}
    with pytest.raises(WeightFileError, match=f"lacks weights of the model: {lost!r}"):
        load_vae(write(tmp_path / "b.safetensors", rest))


@pytest.mark.parametrize("write", ["gguf", "safetensors"])
def test_an_encoder_loads_without_its_tower_and_its_training(write, tmp_path):
    # the text part of a Qwen3-VL is a Qwen3 to ComfyUI
    encoder = random.choice([one for name, one in ENCODERS.items()
                             if not one.unusable and one.towers and "qwen3-vl" not in name])
    with small_towers(encoder):
        weights = {key: tensor for key, tensor in encoder_weights(encoder).items()
                   if not key.startswith(TOWERS) and not key.endswith("logit_scale")}
        path = tmp_path / f"a.{write}"
        if write == "gguf":
            write_encoder(path, dataclasses.replace(encoder, mmproj=None), weights)
        else:
            markers = {key: torch.zeros(shape) for key, shape in encoder.markers.items()}
            safetensors(path, markers | encoder.published(weights) | dict(encoder.extra))
        clip = load_encoder(path, encoder)
    assert not any("lacks" in note or "zeros" in note for note in load_notes(clip.patcher)
                   if not any(marker in note for marker in encoder.markers))
