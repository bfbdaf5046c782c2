"""What the loaders of ControlNets, model patches and CLIP vision models say of files that are not
theirs."""
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import controlnets
import model_patches
import pytest
import torch
import vision_models
from families import FAMILIES, random_weights
from pack_api import WeightFileError, load_diffusion_model
from packed_files import write_for_a_loader, write_q8_0

from featherweight.loaders.models.clip_vision import load_clip_vision
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.model_patch import load_model_patch

pytestmark = pytest.mark.usefixtures("small_models", "small_side_models")

Weights = dict[str, torch.Tensor]


@pytest.fixture
def small_side_models(monkeypatch):
    model_patches.shrink(monkeypatch)
    vision_models.shrink(monkeypatch)


class Side(NamedTuple):
    """A kind of side models.

    Attributes:
        load: Path -> such a model.
        weights: Of a good file.
        part: Weights of which the host does not make a whole one.
        other_sizes: What of a good file's weights has other sizes.
    """

    load: Callable[..., Any]
    weights: Callable[[], Weights]
    part: Weights
    other_sizes: Weights


SIDES = {
    "ControlNet": Side(
        load_controlnet, controlnets.flux_bfl,
        {"controlnet_cond_embedding.conv_in.weight": torch.ones(16, 3, 3, 3)},
        {"txt_in.weight": torch.ones(32, 32)}),
    "model patch": Side(
        load_model_patch, model_patches.qwen,
        {"controlnet_blocks.0.y_rms.weight": torch.ones(256)},
        {"img_in.weight": torch.ones(32, 64)}),
    "CLIP vision model": Side(
        load_clip_vision, vision_models.VISION_MODELS["CLIP L"],
        {"vision_model.encoder.layers.22.layer_norm1.weight": torch.ones(32)},
        {"vision_model.pre_layrnorm.weight": torch.ones(64)}),
}


def of_layer(name: str, *shape: int) -> Callable[[], Weights]:
    return lambda: {name: torch.ones(shape)}


LORA = "double_blocks.0.img_attn.qkv.lora_A.weight"
# what a file holds -> (its weights, what each loader says, {} for what the loader wants)
WRONG = {
    "diffusion model": (lambda: random_weights(FAMILIES["flux-dev"]),
                        r"is a diffusion model, expected a {}\. Pick a {} here\."),
    "LoRA": (of_layer(LORA, 4, 256),
             rf"is a LoRA \(it has '{LORA}'\), expected a {{}}\. Pick a {{}} here\."),
    "nothing known": (of_layer("a.weight", 4, 32),
                      r"holds no {} that this ComfyUI knows \(1 tensors, first 'a.weight'\)\. Pick"
                      r" another file, or update ComfyUI if the {} is new\."),
}
# the same of files of which one loader says it
WRONG_FOR = {
    "ControlNet": {
        "unet": (lambda: random_weights(FAMILIES["sd1.5"]), WRONG["diffusion model"][1]),
        "difference": (
            lambda: controlnets.ldm_with_prefix() | {"difference": torch.ones(1)},
            r"holds the difference between a ControlNet and a model \(it has 'difference'\),"
            " expected a complete ControlNet. Get one with all its weights, or load an unpacked"
            r" one with ComfyUI's Load ControlNet Model \(diff\)."),
    },
    "model patch": {
        "CLIP vision": (of_layer("vision_model.encoder.layers.30.mlp.fc1.weight", 4, 32),
                        r"is a CLIP vision model \(it has '.*'\), expected a {}\."),
        "ControlNet": (controlnets.ldm, r"is a ControlNet \(it has '.*'\), expected a {}\."),
        "missing layers": (lambda: {name: value for name, value in model_patches.qwen().items()
                                    if "output_proj" not in name}, ".*issing"),
    },
    "CLIP vision model": {
        "mmproj": (of_layer("v.blk.0.attn_q.weight", 32, 32),
                   r"is the vision part \(mmproj\) of a text encoder"
                   r" \(it has 'v.blk.0.attn_q.weight'\), expected a {}\."),
        "text encoder": (of_layer("text_model.embeddings.token_embedding.weight", 9, 32),
                         r"is a text encoder \(it has '.*'\), expected a {}\."),
    },
}
CASES = [
    pytest.param(kind, *case, id=f"{kind}: {name}") for kind, side in SIDES.items()
    for name, case in {
        **WRONG, **WRONG_FOR[kind],
        "part": (lambda side=side: side.part, r"holds no {} that this ComfyUI knows"),
        "other sizes": (lambda side=side: side.weights() | side.other_sizes, ".*sizes"),
    }.items()
]


@pytest.mark.parametrize(("kind", "weights", "message"), CASES)
def test_wrong_file_is_refused_in_a_sentence(kind, weights, message, tmp_path):
    suffix = random.choice(["gguf", "safetensors"])
    path, pack_to = tmp_path / f"net.{suffix}", "Q4_K" if suffix == "safetensors" else None
    write_for_a_loader(path, weights())
    message = message.replace("{}", kind)
    with pytest.raises(WeightFileError, match=f"^net.{suffix}:? {message}") as error:
        SIDES[kind].load(str(path), pack_to)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("weights", "kind", "node"), [
    *((kind.weights, "model patch", "Load Model Patch") for kind in model_patches.KINDS.values()),
    (vision_models.VISION_MODELS["CLIP H"], "CLIP vision model", "Load CLIP Vision")])
def test_other_loaders_say_what_it_is_and_where_to_pick_it(weights, kind, node, tmp_path):
    path = str(tmp_path / "net.gguf")
    write_q8_0(path, weights())
    with pytest.raises(WeightFileError, match=f"net.gguf is a {kind} .*, expected a diffusion model"
                                              rf"\. Pick it in {node}"):
        load_diffusion_model(path)
    with pytest.raises(WeightFileError, match=f"is a {kind} .*, expected a ControlNet"):
        load_controlnet(path)
