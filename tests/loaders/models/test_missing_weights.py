"""Every weight of a model left out of its file: the load stops in a sentence, or the node says what
is missing."""
import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import controlnets
import model_patches
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from encoders.encoder import small_towers, write_encoder
from families import FAMILIES, random_weights, shrunken_detection
from packed_files import write_q8_0
from patched_models import relative
from safetensors.torch import save_file
from stored_files import weights_of, write_plain

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.load_check import load_notes, patcher_of
from featherweight.loaders.models.model_patch import load_model_patch
from featherweight.loaders.models.text_encoder import load_text_encoder

pytestmark = pytest.mark.usefixtures("small_models")

DRAWN = 3
Weights = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """shrink: has the host build it small. optional: what the names begin with without which it is
    another model, or that `write` adds or needs."""

    weights: Callable[[], Weights]
    load: Callable[[str], Any]
    write: Callable[[Path, Weights], Any] = write_plain
    shrink: Callable = lambda monkeypatch: None
    optional: tuple[str, ...] = ()
    suffix: str = ".safetensors"


def of_diffusers(name: str, write: Callable, suffix: str) -> Model:
    family = FAMILIES[name]
    return Model(
        lambda: in_diffusers_names(random_weights(family), DIFFUSERS[name](family.config)),
        load_diffusion_model, write, functools.partial(shrunken_detection, family), suffix=suffix)


def of_family(name: str) -> Model:
    family = FAMILIES[name]
    return Model(lambda: random_weights(family), load_diffusion_model,
                 lambda path, weights: save_file({**weights}, path, dict(family.metadata) or None),
                 functools.partial(shrunken_detection, family), OPTIONAL.get(name, ()))


EMBEDDINGS = ("model.embed_tokens.", "embed_tokens.")  # by which some of the tests' writers go


def of_encoder(name: str) -> Model:
    encoder = ENCODERS[name]
    return Model(
        lambda: encoder_weights(encoder),
        lambda path: load_text_encoder([path], encoder.clip_type,
                                       model_options=encoder.model_options),
        lambda path, weights: write_encoder(path, encoder, weights),
        lambda monkeypatch: small_towers(encoder),
        (*(marker.replace("language_model.", "") for marker in encoder.markers),
         *EMBEDDINGS, "visual.", "vision"), ".gguf")


# what the host tells models apart by; Chroma's where the sizes of tests are given to it
OPTIONAL = {
    "chroma": ("distilled_guidance_layer.norms.0",), "chroma-radiance": ("nerf_blocks.0.norm",),
    "ovis-image": ("txt_norm",), "hunyuan-video-1.5": ("cond_type_embedding",)
}
IN_DIFFUSERS_NAMES = [name for name in DIFFUSERS if name in FAMILIES and name != "chroma"]
MODELS = {
    **{name: of_family(name) for name, family in FAMILIES.items() if family.latent},
    **{f"{name} of diffusers": of_diffusers(name, write_plain, ".safetensors")
       for name in IN_DIFFUSERS_NAMES},
    **{f"{name} of diffusers, Q8_0": of_diffusers(name, write_q8_0, ".gguf")
       for name in IN_DIFFUSERS_NAMES},
    **{f"encoder {name}": of_encoder(name)
       for name, encoder in ENCODERS.items() if not encoder.unusable},
    "encoder llama-3-8b by ComfyUI": dataclasses.replace(
        of_encoder("llama-3-8b"), write=write_plain, optional=(), suffix=".safetensors"),
    **{f"ControlNet {name}": Model(kind.weights, load_controlnet, write_plain,
                                   functools.partial(controlnets.shrunken_controlnet, kind),
                                   ("controlnet_mode_embedder",))
       for name, kind in controlnets.KINDS.items()},
    **{f"model patch {name}": Model(kind.weights, load_model_patch, shrink=model_patches.shrink)
       for name, kind in model_patches.KINDS.items()}
}
JOINED = ("ControlNet flux of diffusers", "ControlNet sd3 of diffusers", "flux-dev of diffusers",
          "sd3.5 of diffusers")  # whose q, k and v the host joins
NAMED = {
    "ControlNet sd3.5 large of Stability": "x_embedder.proj.weight",
    "encoder qwen3-0.6b": "model.embed_tokens.weight",
    "encoder qwen3.5-0.8b": "model.layers.0.linear_attn.norm.weight",
    "encoder llama-3-8b by ComfyUI": "model.layers.0.post_attention_layernorm.weight"
}


def check_missing(name: str, choose: Callable[[list[str]], list[str]], folder: Path, monkeypatch):
    model = MODELS[name]
    path, silent = folder / f"a{model.suffix}", []
    with model.shrink(monkeypatch) or contextlib.nullcontext():
        weights = dict(model.weights())
        model.write(path, weights)
        whole = weights_of(patcher_of(model.load(str(path))).model)
        for missing in choose([key for key in weights if not key.startswith(model.optional)]):
            path.unlink()  # not written over while it is mapped
            model.write(path, {key: weights[key] for key in weights if key != missing})
            try:
                patcher = patcher_of(model.load(str(path)))
            except WeightFileError:
                continue
            found = weights_of(patcher.model)
            if not load_notes(patcher) and not all(
                    key in found and found[key].shape == value.shape
                    and relative(found[key], value) < 1e-6 for key, value in whole.items()):
                silent.append(missing)
    assert not silent


@pytest.mark.parametrize("name", JOINED)
def test_a_part_of_a_joined_weight_that_is_missing_is_told(name, tmp_path, monkeypatch):
    def choose(names: list[str]) -> list[str]:
        return random.sample([name for name in names if re.search(r"\.to_[qk]\.", name)], DRAWN)

    check_missing(name, choose, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NAMED)
def test_a_weight_that_the_loader_looks_up_is_told_where_it_is_missing(name, tmp_path, monkeypatch):
    check_missing(name, lambda _: [NAMED[name]], tmp_path, monkeypatch)


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_is_missing_is_told(name, tmp_path, monkeypatch):
    check_missing(name, lambda names: names, tmp_path, monkeypatch)
