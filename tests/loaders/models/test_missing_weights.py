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
from encoders.encoder import load_encoder, small_towers, write_encoder
from encoders.encoder import random_weights as encoder_weights
from families import FAMILIES, random_weights, shrunken_detection
from pack_api import WeightFileError, load_diffusion_model, load_notes
from packed_files import write_q8_0
from patched_models import relative
from safetensors.torch import save_file
from stored_files import weights_of, write_plain

from featherweight.loaders.comfyui.load_check import patcher_of
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.model_patch import load_model_patch

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
        lambda path: load_encoder(path, encoder),
        lambda path, weights: write_encoder(path, encoder, weights),
        lambda monkeypatch: small_towers(encoder),
        (*(marker.replace("language_model.", "") for marker in encoder.markers),
         *EMBEDDINGS, "visual.", "vision"), ".gguf")


# what the host tells models apart by; Chroma's where the sizes of tests are given to it
OPTIONAL = {
    "chroma": ("distilled_guidance_layer.norms.0",), "chroma-radiance": ("nerf_blocks.0.norm",)
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
                                   suffix=" union.safetensors")
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
    "encoder llama-3-8b by ComfyUI": "model.layers.0.post_attention_layernorm.weight",
    # by which ComfyUI tells two models apart
    "ovis-image": "txt_norm.weight", "hunyuan-video-1.5": "cond_type_embedding.weight",
    "ControlNet flux union": "controlnet_mode_embedder.weight"
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


# without which ComfyUI does not know a model that it knows by other names too
FIRST = {"flux-dev": "img_in.weight", "flux2": "img_in.weight", "qwen-image": "img_in.weight",
         "krea2": "first.weight", "z-image": "noise_refiner.0.attention.k_norm.weight",
         "flux-dev of diffusers": "x_embedder.weight", "sd1.5": "input_blocks.0.0.weight"}


@pytest.mark.parametrize("name", FIRST)
def test_a_weight_without_which_the_host_knows_no_model_is_named(name, tmp_path, monkeypatch):
    model = MODELS[name]
    write, suffix = random.choice([(write_q8_0, ".gguf"), (model.write, ".safetensors")])
    prefix = random.choice(["", "model.diffusion_model."]) if "diffusers" not in name else ""
    with model.shrink(monkeypatch) or contextlib.nullcontext():
        write(tmp_path / f"a{suffix}", {
            prefix + key: value for key, value in model.weights().items() if key != FIRST[name]})
        with pytest.raises(WeightFileError, match=f"^a{suffix} lacks '{prefix}{FIRST[name]}', "):
            model.load(str(tmp_path / f"a{suffix}"))


LONGEST = 63  # characters that ggml keeps of a name


def cut(weights: Weights) -> Weights:
    """As stable-diffusion.cpp writes them; names that become one are lost."""
    return {f"model.diffusion_model.{key}"[:LONGEST]: value for key, value in weights.items()}


@pytest.mark.parametrize("draw", [["anima"], [name for name in FAMILIES if name in MODELS]])
def test_names_that_were_cut_are_found_or_the_load_stops(draw, tmp_path, monkeypatch):
    name = random.choice(draw)
    model, write = MODELS[name], random.choice([write_q8_0, write_plain])
    path = tmp_path / ("a.gguf" if write is write_q8_0 else "a.safetensors")
    with model.shrink(monkeypatch) or contextlib.nullcontext():
        weights = model.weights()
        write(path, cut(weights))
        is_whole = len(cut(weights)) == len(weights)
        try:
            patcher = model.load(str(path))
        except WeightFileError as error:
            assert not is_whole and "Update ComfyUI" not in str(error)
            return
        assert is_whole and load_notes(patcher) == ()


LAYER = "transformer_blocks.0.mystery.weight"  # of no model


@pytest.mark.parametrize("name", IN_DIFFUSERS_NAMES)
def test_what_a_file_in_diffusers_names_has_too_much_is_told(name, tmp_path, monkeypatch):
    """As a folder does it."""
    model = MODELS[f"{name} of diffusers"]
    with model.shrink(monkeypatch) or contextlib.nullcontext():
        weights = dict(model.weights())
        path = tmp_path / "a.safetensors"
        model.write(path, weights | {LAYER: torch.ones(32, 32)})
        assert load_notes(model.load(str(path))) == (
            f"The model does not use {LAYER!r} of a.safetensors.",)
        lost = random.choice([key for key in weights if re.search(r"(blocks|layers)\.", key)])
        path.unlink()
        model.write(path, {f"{key}_" if key == lost else key: weights[key] for key in weights})
        with pytest.raises(WeightFileError, match=f"{lost}_|lacks|cannot build|sizes"):
            model.load(str(path))


WRAPPERS = ("transformer.", "_orig_mod.", "model.diffusion_model._orig_mod.", "module.",
            "model.diffusion_model.module.", "transformer.model.")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_all_names_are_stripped(wrapper, tmp_path, monkeypatch):
    for name in ("krea2", random.choice([name for name, family in FAMILIES.items()
                                         if family.latent])):
        model = MODELS[name]
        with monkeypatch.context() as patch, model.shrink(patch) or contextlib.nullcontext():
            model.write(tmp_path / f"{name}.safetensors", {
                wrapper + key: value for key, value in model.weights().items()})
            assert load_notes(model.load(str(tmp_path / f"{name}.safetensors"))) == ()


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_is_missing_is_told(name, tmp_path, monkeypatch):
    check_missing(name, lambda names: names, tmp_path, monkeypatch)
