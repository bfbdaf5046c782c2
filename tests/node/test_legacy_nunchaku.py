"""The nodes of ComfyUI-nunchaku: what they load, LoRAs with their full strength, inputs without
effect, and what a value of a workflow cannot name."""
import os

import comfy.sd
import comfy.text_encoders.flux
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import random_weights, write_encoder
from legacy_ids import INPUTS, NUNCHAKU
from model_folders import use_empty_folders
from pack_api import is_packed
from patched_models import (
    LIMIT,
    error_by_effect,
    flux_file,
    flux_pair,
    lora_for,
    patched,
    run,
)
from prompt_errors import NODES, input_errors
from safetensors.torch import save_file
from workflow_files import FLUX_SIZES, nf4, nf4_folder

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.nodes.legacy import loaders

pytestmark = pytest.mark.usefixtures("small_models")

LOADERS = [node_id for node_id in NUNCHAKU if "DiTLoader" in node_id]
ENCODER_LOADERS = [node_id for node_id in NUNCHAKU if "TextEncoder" in node_id]
LORA_NODES = [node_id for node_id in NUNCHAKU if "Lora" in node_id]
STACKS = [node_id for node_id in LORA_NODES if "Stack" in node_id]
# Options and limits of the original.
CHOICES = {
    "attention": ["nunchaku-fp16", "flash-attention2"],
    "cpu_offload": ["auto", "enable", "disable"],
    "data_type": ["bfloat16", "float16"], "i2f_mode": ["enabled", "always"],
    "use_pin_memory": ["enable", "disable"], "use_4bit_t5": ["disable", "enable"]
}
MODEL_TYPES = {"NunchakuTextEncoderLoader": "flux", "NunchakuTextEncoderLoaderV2": "flux.1"}
LIMITS = {
    "cache_threshold": (0, 1), "num_blocks_on_gpu": (1, 60), "t5_min_length": (256, 1024),
    "lora_count": (1, 10), **dict.fromkeys(
        ["lora_strength", *(f"lora_strength_{slot}" for slot in range(1, 16))], (-100, 100))
}


def file_input(node_id: str) -> str:
    return "model_path" if "Flux" in node_id else "model_name"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The host's folders, each with a directory of its own."""
    use_empty_folders(tmp_path, monkeypatch)
    return tmp_path


def input_of(node_id: str, name: str):
    return next(input for input in NODES[node_id].define_schema().inputs if input.id == name)


@pytest.mark.parametrize("node_id", NUNCHAKU)
def test_inputs_have_the_options_and_limits_of_the_original(node_id):
    for input in NODES[node_id].GET_SCHEMA().inputs:
        if input.id in CHOICES:
            assert input.options == CHOICES[input.id]
        if input.id in LIMITS:
            assert (input.min, input.max) == LIMITS[input.id]
        if input.id == "model_type":
            assert input.options == [MODEL_TYPES[node_id]]


@pytest.mark.parametrize("node_id", NUNCHAKU)
def test_the_editor_has_the_inputs_in_the_order_of_the_original(node_id):
    """It shows the required ones first, and a workflow has its values in that order."""
    sections = NODES[node_id].INPUT_TYPES()
    shown = [name for section in ("required", "optional") for name in sections.get(section, {})]
    assert shown == list(INPUTS[node_id])


@pytest.mark.parametrize("node_id", LOADERS)
def test_a_loader_offers_files_and_folders_of_models_and_loads_each(node_id, base):
    models = base / "diffusion_models"
    (models / "flux").mkdir()
    write_gguf(models / "flux" / "one.gguf", tiny_models.flux(**FLUX_SIZES),
               lambda name, values: "Q8_0" if values.ndim == 2 else "F32")
    nf4(models / "flux" / "two.safetensors")
    nf4_folder(models / "svdq-int4-flux.1-dev")
    offered = input_of(node_id, file_input(node_id)).options
    assert {"flux/one.gguf", "flux/two.safetensors", "svdq-int4-flux.1-dev"} <= {
        name.replace(os.sep, "/") for name in offered}
    for name in ("flux\\one.gguf", "flux/two.safetensors", "svdq-int4-flux.1-dev"):
        inputs = {file_input(node_id): name}
        assert name in input_of(node_id, file_input(node_id)).options
        model, = NODES[node_id].execute(**inputs)
        assert type(model.model).__module__ == "comfy.model_base"
        assert is_packed(model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight)


OTHER_VALUES = {
    "cache_threshold": 0.12, "attention": "flash-attention2", "cpu_offload": "enable",
    "device_id": 3, "data_type": "float16", "i2f_mode": "always", "num_blocks_on_gpu": 20,
    "use_pin_memory": "enable"
}


@pytest.mark.parametrize("node_id", LOADERS)
def test_inputs_without_effect_change_nothing(node_id, base):
    write_gguf(base / "diffusion_models" / "flux.gguf", tiny_models.flux(**FLUX_SIZES),
               lambda name, values: "Q8_0" if values.ndim == 2 else "F32")
    file = {file_input(node_id): "flux.gguf"}
    other = {name: OTHER_VALUES[name] for name in INPUTS[node_id] if name not in file}
    assert all("Kept for old workflows" in input_of(node_id, name).tooltip for name in other)
    plain, model = (NODES[node_id].execute(**file, **more)[0] for more in ({}, other))
    assert model.load_device == plain.load_device and not model.patches
    assert model.model_dtype() == plain.model_dtype()
    assert model.model_options == plain.model_options


@pytest.fixture
def encoders(base, monkeypatch):
    """Small text encoders of Flux, and sizes for the host's."""
    sizes = {}
    for file, name in (("t5.gguf", "t5-xxl"), ("clip_l.gguf", "clip-l")):
        write_encoder(base / "text_encoders" / file, ENCODERS[name], random_weights(ENCODERS[name]))
        sizes |= ENCODERS[name].model_options
    load = loaders.load_text_encoder
    monkeypatch.setattr(
        loaders, "load_text_encoder", lambda *args, model_options=None: load(
            *args, model_options={**sizes, **(model_options or {})}))
    return {"text_encoder1": "t5.gguf", "text_encoder2": "clip_l.gguf"}


@pytest.mark.parametrize("node_id", ENCODER_LOADERS)
@pytest.mark.parametrize("length", [256, 512, 640])
def test_the_prompt_is_filled_up_to_the_tokens_that_the_workflow_names(node_id, length, encoders):
    given = {"model_type": MODEL_TYPES[node_id], **encoders, "t5_min_length": length}
    clip, = NODES[node_id].execute(**given)
    assert isinstance(clip.cond_stage_model, comfy.text_encoders.flux.FluxClipModel)
    tokens = clip.tokenize("a feather")
    assert [len(batch) for batch in tokens["t5xxl"]] == [length]
    assert any(map(is_packed, clip.patcher.model.parameters()))
    swapped = dict(zip(encoders, reversed(encoders.values())))
    other, = NODES[node_id].execute(**given | swapped)
    assert other.tokenize("a feather")["t5xxl"] == tokens["t5xxl"]


def test_the_older_loader_of_text_encoders_takes_a_t5_that_is_not_there(encoders):
    asked = {"use_4bit_t5": "enable", "int4_model": "../svdq-flux.1-t5"}
    assert input_errors("NunchakuTextEncoderLoader", **encoders, **asked) == {}
    clip, = NODES["NunchakuTextEncoderLoader"].execute(
        model_type="flux", **encoders, t5_min_length=256, **asked)
    assert clip.tokenize("a")["t5xxl"]


@pytest.fixture
def loras(base):
    """Two LoRAs for the small Flux, one of them in a folder."""
    _, values = flux_file("Q8_0")
    loras = {
        "style.safetensors": lora_for(values, seed=1), "turbo/eight.safetensors": lora_for(
            values, seed=2, layer_name=lambda name: f"diffusion_model.{name}")
    }
    (base / "loras" / "turbo").mkdir()
    for name, tensors in loras.items():
        save_file(tensors, base / "loras" / name)
    return loras


def slots(node_id: str, *loras: tuple) -> dict:
    """Inputs of a LoRA node: (file, strength) of each LoRA from the first on."""
    if node_id not in STACKS:
        (name, strength), = loras
        return {"lora_name": name, "lora_strength": strength}
    inputs = {"clip": None} if "clip" in INPUTS[node_id] else {}
    for slot, (name, strength) in enumerate(loras, start=1):
        inputs |= {f"lora_name_{slot}": name, f"lora_strength_{slot}": strength}
    return inputs


def assert_patched_as_the_host_patches_a_dense_model(model, *loras):
    packed, dense = flux_pair("Q8_0")
    without, expected = run(packed), run(patched(dense, *loras))
    assert error_by_effect(run(model), expected, without) < LIMIT


@pytest.mark.parametrize("strength", [0.7, -0.4])
@pytest.mark.parametrize("node_id", LORA_NODES)
def test_a_lora_has_its_full_effect(node_id, strength, loras):
    packed, _ = flux_pair("Q8_0")
    model = NODES[node_id].execute(packed, **slots(node_id, ("style.safetensors", strength)))[0]
    assert not packed.patches
    assert_patched_as_the_host_patches_a_dense_model(
        model, (loras["style.safetensors"], strength))


@pytest.mark.parametrize("node_id", STACKS)
def test_a_stack_adds_its_loras_to_those_there_are_and_skips_empty_slots(node_id, loras):
    packed, _ = flux_pair("Q8_0")
    first, = NODES["NunchakuFluxLoraLoader"].execute(packed, "style.safetensors", 0.3)
    named = slots(node_id, ("None", 1.0), ("turbo\\eight.safetensors", 0.5), ("", 1.0),
                  ("style.safetensors", 0.2), ("style.safetensors", 0.0))
    model = NODES[node_id].execute(first, **named)[0]
    style, turbo = loras.values()
    assert_patched_as_the_host_patches_a_dense_model(model, (style, 0.5), (turbo, 0.5))


@pytest.mark.parametrize("node_id", [node_id for node_id in STACKS if "Flux" not in node_id])
def test_a_stack_applies_as_many_slots_as_it_is_told(node_id, loras):
    packed, _ = flux_pair("Q8_0")
    named = slots(node_id, ("style.safetensors", 0.5), ("gone.safetensors", 1.0))
    assert input_errors(node_id, **named, lora_count=1) == {}
    assert "gone" in input_errors(node_id, **named, lora_count=2)["lora_name_1"]
    model = NODES[node_id].execute(packed, **named, lora_count=1)[0]
    assert_patched_as_the_host_patches_a_dense_model(model, (loras["style.safetensors"], 0.5))


@pytest.mark.parametrize("node_id", [node_id for node_id in STACKS if "enabled_1" in
                                     INPUTS[node_id]])
@pytest.mark.parametrize("toggle_all", [True, False])
def test_the_switch_of_each_lora_decides(node_id, toggle_all, loras):
    packed, _ = flux_pair("Q8_0")
    named = slots(node_id, ("gone.safetensors", 1.0), ("style.safetensors", 0.5))
    switches = {"enabled_1": False, "enabled_2": True, "toggle_all": toggle_all}
    assert input_errors(node_id, **named, **switches) == {}
    model = NODES[node_id].execute(packed, **named, **switches)[0]
    assert_patched_as_the_host_patches_a_dense_model(model, (loras["style.safetensors"], 0.5))


@pytest.mark.parametrize("node_id", LORA_NODES)
def test_without_a_lora_the_model_passes_as_it_is(node_id, base):
    packed, _ = flux_pair("Q8_0")
    named = slots(node_id, ("gone.safetensors", 0.0))
    assert input_errors(node_id, **named) == {}
    assert NODES[node_id].execute(packed, **named)[0] is packed


def test_the_text_encoder_of_a_stack_passes_as_it_is(loras):
    packed, _ = flux_pair("Q8_0")
    clip = object()
    _, passed = NODES["NunchakuZImageTurboLoraStackV4"].execute(
        packed, clip=clip, lora_name_1="style.safetensors", lora_count=1)
    assert passed is clip


@pytest.mark.parametrize("node_id", LORA_NODES)
def test_a_lora_that_does_not_fit_or_a_strength_that_is_no_number_is_told(node_id, base):
    packed, _ = flux_pair("Q8_0")
    save_file({"lora_unet_other.lora_up.weight": torch.ones(3, 1),
               "lora_unet_other.lora_down.weight": torch.ones(1, 3)},
              base / "loras" / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not applied. None of the 1 layers"):
        NODES[node_id].execute(packed, **slots(node_id, ("other.safetensors", 1.0)))
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lora_strength is"):
            NODES[node_id].execute(packed, **slots(node_id, ("other.safetensors", strength)))


OUTSIDE = ["../secret.safetensors", "..\\secret.safetensors", "/etc/passwd",
           "C:\\secret.safetensors", "\\\\host\\share\\secret.safetensors"]


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("node_id", NUNCHAKU)
def test_no_value_names_a_file_outside_of_the_model_folders(node_id, value, base):
    (base / "secret.safetensors").touch()
    node, packed = NODES[node_id], object()
    names = [name for name in INPUTS[node_id] if name.startswith(("model_path", "model_name",
                                                                  "text_encoder", "lora_name"))]
    assert names
    for name in names:
        given = {other: value for other in names if other.startswith("text_encoder")}
        given |= {name: value}
        first = {"lora_name_1": "None"} if node_id in STACKS else {}
        errors = input_errors(node_id, **first | given)
        assert errors and all(
            "in none of the model folders" in message or f": {value!r} not in" in message
            for message in errors.values())
        model = {"model": packed} if "model" in INPUTS[node_id] else {}
        clip = {"clip": None} if "clip" in INPUTS[node_id] else {}
        with pytest.raises(ValueError, match="is in none of the model folders"):
            node.execute(**model, **clip, **given)
