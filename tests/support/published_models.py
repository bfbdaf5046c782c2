"""The models in `published_files`: their weights under published names, and how each is loaded in
a small size."""
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.minimax.audio_vae
import comfy.ldm.minimax.vae
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.sd1_clip
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.sd3_clip import t5_xxl_detect
from encoders import ENCODERS
from encoders.clip import CLIP_SMALL, LAYER
from encoders.encoder import random_weights as encoder_weights
from encoders.encoder import small_towers, text_model
from encoders.t5 import T5_SMALL
from families import FAMILIES, Family, random_weights, shrink_parts, shrunken_detection
from pack_api import load_checkpoint, load_diffusion_model, load_text_encoder

from featherweight.loaders.comfyui.compute import FOLLOW_COMPUTE
from featherweight.loaders.comfyui.load_check import patcher_of
from featherweight.loaders.inspect.identify import CHECKPOINT, ENCODER, MODEL
from featherweight.loaders.models.vae import load_vae

Weights = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."


@dataclasses.dataclass(frozen=True)
class Published:
    """A model of the size of tests.

    Attributes:
        role: what *Inspect Model File* says that a file is.
        host_name: what was loaded -> the host's name of it, "" where an inspection names none.
        weights: returns the weights under published names.
        load: loads a file or folder as a person does.
        small: while it is entered, the host builds the model small.
        parameters: what was loaded -> its weights under published names.
    """

    role: str
    host_name: Callable[[Any], str]
    weights: Callable[[], Weights]
    load: Callable[[str, str], Any]
    small: Callable[[pytest.MonkeyPatch], AbstractContextManager]
    parameters: Callable[[Any], Mapping[str, torch.Tensor]]


def weights_in(model: torch.nn.Module) -> Weights:
    """Returns the weights and buffers of a model, as they are in its layers."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


# --- diffusion models
# ------------------------------------------------------------------------------------------------

FLUX, WAN, LTX = FAMILIES["flux-dev"], FAMILIES["wan2.1-t2v"], FAMILIES["ltx-2"]
OF_19B = {name: value for name, value in json.loads(LTX.metadata["config"])["transformer"].items()
          if "gated" not in name and "caption_proj" not in name and "adaln" not in name}
# that `FAMILIES` does not have
VARIANTS = {
    "flux-fill": dataclasses.replace(FLUX, supported="FluxInpaint",
                                     config={**FLUX.config, "in_channels": 96}),
    "wan2.2-i2v": dataclasses.replace(WAN, config={**WAN.config, "in_dim": 36}),
    "ltx-2-19b": dataclasses.replace(
        LTX, config={"image_model": "ltxav", "num_layers": 1, **OF_19B},
        metadata={"config": json.dumps({"transformer": OF_19B})}),
}
# whose names are Black Forest Labs'
WITH_SCALES = ("flux", "chroma", "hunyuan-video")


def family_of(name: str) -> Family:
    return VARIANTS[name] if name in VARIANTS else FAMILIES[name]


def published_name(family: str, name: str) -> str:
    """Returns the name in published files of a weight in the host's model."""
    if family.startswith(WITH_SCALES) and name.endswith(("query_norm.weight", "key_norm.weight")):
        return f"{name.removesuffix('weight')}scale"
    return name


def family_weights(name: str) -> Weights:
    return {published_name(name, key): value
            for key, value in random_weights(family_of(name)).items()}


def host_model_name(family: Family, patcher: ModelPatcher) -> str:
    """Returns the host's configuration of a model, whose class is that of its family."""
    assert type(patcher.model).__name__ == family.host_class.rpartition(".")[2]
    return type(patcher.model.model_config).__name__


def diffusion_model(name: str) -> Published:
    family = family_of(name)
    names = functools.cache(lambda: {
        published_name(name, key): key for key in random_weights(family)})

    def parameters(patcher):
        found = weights_in(patcher.model.diffusion_model)
        return {key: found[target] for key, target in names().items()}

    def load(path: str, compute: str):
        return load_diffusion_model(path, compute=compute, host_formats=FOLLOW_COMPUTE)

    @contextlib.contextmanager
    def small(monkeypatch: pytest.MonkeyPatch):
        shrunken_detection(family, monkeypatch)
        yield

    return Published(MODEL, functools.partial(host_model_name, family),
                     lambda: family_weights(name), load, small, parameters)


# --- text encoders
# ------------------------------------------------------------------------------------------------

def text_encoder(name: str) -> Published:
    encoder = ENCODERS[name]

    def own_weights() -> Weights:
        # an mmproj file holds the towers of others
        towers = {} if encoder.mmproj else encoder_weights(encoder, towers=True)
        return {**encoder_weights(encoder), **towers}

    @functools.cache
    def names() -> dict[str, str]:
        """Published name -> the name in the host's model."""
        named = encoder.published({key: _Named(key) for key in own_weights()})
        return {key: target.name for key, target in named.items()}

    @contextlib.contextmanager
    def small(monkeypatch: pytest.MonkeyPatch):
        detect = comfy.sd.detect_te_model
        first = next(iter(names()))

        def detect_small(state_dict):
            """Sees what the small encoder lacks of that by which the host tells encoders apart."""
            markers = {key: torch.empty(shape, device="meta")
                       for key, shape in encoder.markers.items() if first in state_dict}
            return detect({**markers, **state_dict})

        monkeypatch.setattr(comfy.sd, "detect_te_model", detect_small)
        # it looks for the dtypes of a T5 where it finds its last layer
        monkeypatch.setattr(comfy.sd, "t5xxl_detect", lambda parts: t5_xxl_detect(parts[0]))
        with small_towers(encoder):
            yield

    def load(path: str, compute: str):
        return load_text_encoder([path], encoder.clip_type, model_options=encoder.model_options,
                                 host_formats=FOLLOW_COMPUTE, compute=compute)

    def parameters(clip):
        found = weights_in(text_model(clip).transformer)
        return {key: found[target] for key, target in names().items() if target in found}

    return Published(ENCODER, lambda loaded: encoder.te_model,
                     lambda: dict(encoder.published(own_weights())), load, small, parameters)


@dataclasses.dataclass(frozen=True)
class _Named:
    """Stands for a weight while its name changes."""

    name: str


# --- VAEs
# ------------------------------------------------------------------------------------------------

KL = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3,
      "ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
      "dropout": 0.0}
OF_FLUX2 = {**KL, "z_channels": 32, "batch_norm_latent": True}
OF_SDXL = {**KL, "z_channels": 4}
PLAIN_ENGINE = "comfy.ldm.modules.diffusionmodules.model."
OF_HUNYUAN = {"block_out_channels": [32, 32, 32, 64, 64], "z_channels": 32, "in_channels": 3,
              "out_channels": 3, "num_res_blocks": 1, "ffactor_spatial": 16, "ffactor_temporal": 4,
              "downsample_match_channel": True, "upsample_match_channel": True}
OF_LTX = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
    "latent_channels": 128, "norm_layer": "pixel_norm", "patch_size": 4,
    "latent_log_var": "uniform", "use_quant_conv": False, "causal_decoder": False,
    "encoder_base_channels": 16, "decoder_base_channels": 16,
    "encoder_blocks": [["res_x", {"num_layers": 1}], ["compress_space_res", {"multiplier": 2}]],
    "decoder_blocks": [["res_x", {"num_layers": 1}]]}


def engine(encoder: str, decoder: str, params: Mapping[str, Any],
           decoder_params: Mapping[str, Any] | None = None,
           regularizer: str = "DiagonalGaussianRegularizer") -> dict[str, Any]:
    return {"regularizer_config": {"target": f"comfy.ldm.models.autoencoder.{regularizer}"},
            "encoder_config": {"target": encoder, "params": dict(params)},
            "decoder_config": {"target": decoder, "params": dict(decoder_params or params)}}


OF_FLUX = engine(f"{PLAIN_ENGINE}Encoder", f"{PLAIN_ENGINE}Decoder", KL)
OF_HUNYUAN_15 = engine("comfy.ldm.hunyuan_video.vae_refiner.Encoder",
                       "comfy.ldm.hunyuan_video.vae_refiner.Decoder", OF_HUNYUAN,
                       regularizer="EmptyRegularizer")
# name -> class of the host, what it is built with, what of that the host does not read from a
# file, and more parts that it holds fixed
VAES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "flux": ("comfy.sd.AutoencodingEngine", OF_FLUX, ("encoder_config",), {}),
    "flux2": ("comfy.sd.AutoencoderKL", {"ddconfig": OF_FLUX2, "embed_dim": 32}, ("ddconfig",), {}),
    "flux2 with a small decoder": ("comfy.sd.AutoencoderKL", {
        "ddconfig": {**OF_FLUX2, "ch": 64}, "decoder_ddconfig": OF_FLUX2, "embed_dim": 32},
        ("ddconfig",), {}),
    "sdxl": ("comfy.sd.AutoencoderKL", {"ddconfig": OF_SDXL, "embed_dim": 4}, ("ddconfig",), {}),
    "wan2.1": ("comfy.ldm.wan.vae.WanVAE", {
        "dim": 32, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "attn_scales": [],
        "temperal_downsample": [False, True, True]}, (), {}),
    "wan2.2": ("comfy.ldm.wan.vae2_2.WanVAE", {
        "dim": 16, "dec_dim": 32, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "attn_scales": [],
        "temperal_downsample": [False, True, True]}, ("dim", "dec_dim"), {}),
    "hunyuan-video-1.5": ("comfy.sd.AutoencodingEngine", OF_HUNYUAN_15,
                          ("encoder_config", "decoder_config"), {}),
    "ace-1.5": ("comfy.sd.AudioOobleckVAE", {"channels": 8, "strides": [2, 4, 4, 6, 10]},
                ("channels",), {}),
    "minimax-h3": ("comfy.ldm.minimax.vae.MiniMaxH3VideoVAE", {"ch": 32}, ("ch",), {
        "comfy.ldm.minimax.vae.ViT3DDecoder": {"num_layers": 1, "heads": 4}}),
    "minimax-h3 audio": ("comfy.ldm.minimax.audio_vae.MiniMaxH3AudioVAE",
                         {"encoder_dim": 8, "latent_dim": 256, "decoder_dim": 128},
                         ("encoder_dim", "latent_dim", "decoder_dim"), {}),
    "ltx-2": ("comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", {"config": OF_LTX},
              ("config",), {}),
}


@functools.cache
def vae_weights(name: str) -> Weights:
    path, options, _, parts = VAES[name]
    module, _, class_name = path.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        shrink_parts(_parts(parts), patch)
        with torch.device("meta"):
            model = getattr(_module(module), class_name)(**options)
        shapes = {key: value.shape for key, value in model.state_dict().items()
                  if value.is_floating_point()}
        counts = {key: torch.ones(value.shape, dtype=value.dtype, device="cpu")
                  for key, value in model.state_dict().items() if key not in shapes}
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        if len(shape) > 1 else torch.full(shape, 0.5) for key, shape in shapes.items()
    } | counts


def _module(name: str):
    return functools.reduce(getattr, name.split(".")[1:], comfy)


def _parts(parts: Mapping[str, Mapping[str, Any]]) -> Family:
    """Returns a family of which `shrink_parts` needs no more."""
    return Family("", "", {}, None, None, parts=parts)


@contextlib.contextmanager
def small_vae(name: str, monkeypatch: pytest.MonkeyPatch):
    path, options, fixed, parts = VAES[name]
    shrink_parts(_parts({path: {key: options[key] for key in fixed}, **parts}), monkeypatch)
    yield


def vae(name: str) -> Published:
    def parameters(loaded):
        return weights_in(loaded.first_stage_model)

    return Published("VAE", lambda loaded: "", lambda: dict(vae_weights(name)),
                     lambda path, compute: load_vae(path),
                     functools.partial(small_vae, name), parameters)


# --- checkpoints
# ------------------------------------------------------------------------------------------------

# as wide as it is, by which the loaders know it; of few tokens while `small_encoders` is entered
WIDE_CLIP_L = dataclasses.replace(
    ENCODERS["clip-l"], markers={LAYER.format(0): (128, 768)},
    config={**CLIP_SMALL, "hidden_size": 768, "num_attention_heads": 12})
# not the one of which `shapes_of` keeps the full table
CLIP_G_OF_FEW_TOKENS = dataclasses.replace(ENCODERS["clip-g"])


@contextlib.contextmanager
def small_encoders(monkeypatch: pytest.MonkeyPatch):
    """While it is entered, the host builds the text encoders of checkpoints small."""
    build = comfy.sd1_clip.SDClipModel.__init__
    sizes = {"clip_l_model_config": WIDE_CLIP_L.config, "clip_g_model_config": CLIP_SMALL,
             "t5xxl_model_config": T5_SMALL}
    shrink_parts(_parts({"comfy.clip_model.CLIPEmbeddings": {"vocab_size": 256}}), monkeypatch)

    def build_small(self, *args, model_options=None, **options):
        build(self, *args, model_options={**(model_options or {}), **sizes}, **options)

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", build_small)
    yield


def checkpoint(family_name: str, vae_name: str = "") -> Published:
    """A checkpoint of a diffusion model, with a VAE and text encoders where it has them."""
    family = family_of(family_name)

    @contextlib.contextmanager
    def small(monkeypatch: pytest.MonkeyPatch):
        shrunken_detection(family, monkeypatch)
        with small_encoders(monkeypatch), contextlib.ExitStack() as stack:
            if vae_name:
                stack.enter_context(small_vae(vae_name, monkeypatch))
            yield

    def load(path: str, compute: str):
        return load_checkpoint(path, compute=compute, host_formats=FOLLOW_COMPUTE)

    def weights() -> Weights:
        return {PREFIX + key: value for key, value in family_weights(family_name).items()}

    def parameters(parts):
        return {PREFIX + key: value
                for key, value in diffusion_model(family_name).parameters(parts[0]).items()}

    return Published(CHECKPOINT, lambda parts: host_model_name(family, parts[0]), weights, load,
                     small, parameters)


def patchers(loaded: Any) -> list[Any]:
    """Returns the patchers of what was loaded."""
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    return [patcher for part in parts if (patcher := patcher_of(part)) is not None]
