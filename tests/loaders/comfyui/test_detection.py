"""Files with a name or two of a diffusion model and without the rest of it: the host's detection
counts on that."""
from types import SimpleNamespace

import comfy.model_detection
import pytest
import torch
from families import FAMILIES, random_weights
from host_formats import in_host_format
from pack_api import (
    SaveError,
    WeightFileError,
    load_checkpoint,
    load_diffusion_model,
    source_of_file,
)
from patched_models import flux_file
from safetensors.torch import save_file

from featherweight.loaders.comfyui import weight_keys
from featherweight.loaders.inspect import inspect
from featherweight.loaders.lora.lora_file import load_lora_file

pytestmark = pytest.mark.usefixtures("small_models")

UNKNOWN = ("model.safetensors( holds no .* that this ComfyUI knows|: .* cannot build a model"
           "|: .* their sizes are not)")
PARTS = {
    "flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (64, 64)},
    "flux of diffusers": {"x_embedder.weight": ()}, "flux 2 of diffusers": {
        "x_embedder.weight": (64, 64), "transformer_blocks.0.attn.to_q.weight": (64, 64)
    }, "hunyuan video": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (64,)},
    "sd3": {"joint_blocks.0.context_block.attn.qkv.weight": (64, 64)}, "sd3 of diffusers": {
        "pos_embed.proj.weight": (64, 16, 2, 2),
        "transformer_blocks.0.attn.add_q_proj.weight": (64, 64)
    }, "unet": {"input_blocks.0.0.weight": (320, 4, 3, 3)}, "unet of diffusers": {
        "conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)
    }, "wan": {"head.modulation": (1, 2, 64), "patch_embedding.weight": (64, 16, 1, 2, 2)},
    "z-image of diffusers": {"noise_refiner.0.attention.norm_k.weight": (64,)}
}


@pytest.fixture(params=PARTS)
def path(request, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in PARTS[request.param].items()},
              tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("load", [load_diffusion_model, load_checkpoint])
def test_a_few_weights_of_a_model_are_no_model(load, path):
    with pytest.raises(WeightFileError, match=UNKNOWN) as error:
        load(path, pack_to="Q8_0")
    assert "\n" not in str(error.value)


def test_a_unet_whose_blocks_the_host_counts_wrongly_is_refused_in_a_sentence(tmp_path):
    weights = dict(random_weights(FAMILIES["sd1.5"]))
    del weights["output_blocks.1.0.in_layers.0.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError, match=r"model.safetensors: .* cannot build a model of their"
                                              r" number and sizes \(pop from empty list\)\. Down"):
        load_diffusion_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(("format_name", "count"), [
    ("Q4_K", 2), ("INT8", 2), ("float8_e4m3fn", 3)])  # also whether the names are ComfyUI's
def test_comfyui_detects_a_model_once_for_its_names_and_once_to_build_it(
        format_name, count, monkeypatch):
    path, detections = flux_file(format_name)[0], []
    detect = comfy.model_detection.detect_unet_config

    def counted(*arguments, **options):
        detections.append(arguments)
        return detect(*arguments, **options)

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", counted)
    monkeypatch.setattr(weight_keys, "detect_unet_config", counted)
    load_diffusion_model(path)
    assert len(detections) == count


LACKS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"
        " tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)")
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "name",
    [
        "comfy.model_detection.detect_unet_config",
        "comfy.ops.mixed_precision_ops",
        "comfy.utils.load_torch_file",
    ],
)
def test_a_lack_of_memory_is_no_unknown_model(tmp_path, monkeypatch, name, error):
    weights, path = (
        {"double_blocks.0.img_mlp.0.weight": torch.ones(32, 32)},
        tmp_path / "model.safetensors",
    )
    parts, _ = in_host_format(*weights.popitem(), "float8_e4m3fn")
    if name == "comfy.ops.mixed_precision_ops":
        # a part that this pack does not know leaves the weight to the host
        parts["double_blocks.0.img_mlp.0.weight_more"] = torch.ones(1)
    save_file(parts, path)

    def fail(*arguments, **options):
        raise error

    class Layer:
        def __init__(self, *arguments, **options):
            raise error

    monkeypatch.setattr(
        name,
        (lambda **options: SimpleNamespace(Linear=Layer)) if name.startswith("comfy.ops") else fail)
    with pytest.raises(type(error)):
        load_lora_file(str(path)) if "torch_file" in name else source_of_file(path)


def test_a_few_weights_of_a_model_are_inspected_and_read(path):
    assert all(found.model_type for found in inspect(path)) and source_of_file(path).weights


def test_a_lora_on_a_few_weights_of_a_model_is_refused_in_a_sentence(path, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.txt_in.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}, lora)
    messages = "is not a model that this ComfyUI knows|lora.safetensors is not applied"
    with pytest.raises(SaveError, match=messages):
        source_of_file(path, [(str(lora), 1.0)])
