"""Small ControlNets of the host's classes, written packed, in the hands of the host's nodes."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.ldm.flux.controlnet
import comfy.ldm.hydit.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.memory_management
import comfy.ops
import nunchaku_writer
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names
from families import FAMILIES, shrunken_detection
from host_nodes import MODELS, UNET, conditioning, models, seeded, two_steps
from pack_api import PackedLayer, is_packed
from packed_files import PACKED_FILES, write_sdnq

import nodes as host_nodes

FLUX = FAMILIES["flux-dev"]


def random_values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> float32 values, small enough for any depth."""
    weights = {}
    for index, (name, value) in enumerate(module.state_dict().items()):
        values = seeded(*value.shape, seed=index) * (0.05 if value.ndim > 1 else 0.02)
        weights[name] = values + ("norm" in name and value.ndim == 1 and "bias" not in name)
    return weights


def build_weights(controlnet: Callable[..., torch.nn.Module], **options) -> dict[str, torch.Tensor]:
    """Random values for one of the host's ControlNets."""
    # with it, layers have no weights until they load
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        return random_values(controlnet(
            operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu", **options))


def unet_controlnet(family) -> dict[str, torch.Tensor]:
    config = {name: value for name, value in family.config.items() if name != "out_channels"}
    return build_weights(comfy.cldm.cldm.ControlNet, hint_channels=3, num_heads=-1,
                         num_head_channels=64, **config)


@functools.cache
def ldm() -> dict[str, torch.Tensor]:
    return unet_controlnet(UNET)


@functools.cache
def sdxl() -> dict[str, torch.Tensor]:
    return unet_controlnet(FAMILIES["sdxl"])


def in_names_of_diffusers(weights, name: str) -> dict[str, torch.Tensor]:
    """Weights of a ControlNet that is a shortened model of a family; other layers stay."""
    table = DIFFUSERS[name](FAMILIES[name].config)
    converted = {target if isinstance(target, str) else target[0] for target in table.values()}
    stored = in_diffusers_names(weights, table) | {
        key: value for key, value in weights.items() if key not in converted
    }
    return {key: value.contiguous() for key, value in stored.items()}


@functools.cache
def sd3_diffusers(channels: int = 16) -> dict[str, torch.Tensor]:
    """As InstantX writes them for SD3 and SD 3.5: diffusers' names, with a hint of latents and, of
    17 channels, of a mask."""
    values = build_weights(comfy.cldm.mmdit.ControlNet, num_blocks=2,
                           control_latent_channels=channels, **FAMILIES["sd3.5"].config)
    return in_names_of_diffusers(values, "sd3.5")


@functools.cache
def qwen() -> dict[str, torch.Tensor]:
    return build_weights(comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel,
                         **FAMILIES["qwen-image"].config)


@functools.cache
def ldm_with_prefix() -> dict[str, torch.Tensor]:
    return {f"control_model.{name}": value for name, value in ldm().items()}


@functools.cache
def flux_bfl() -> dict[str, torch.Tensor]:
    """As XLabs writes them: a shortened Flux in its own names, with a hint of pixels."""
    return {name.replace("_norm.weight", "_norm.scale"): value
            for name, value in build_weights(comfy.ldm.flux.controlnet.ControlNetFlux,
                                     **FLUX.config).items()}


@functools.cache
def flux_diffusers(**options) -> dict[str, torch.Tensor]:
    """As InstantX and Shakker write them: diffusers' names, with a hint of latents."""
    values = build_weights(comfy.ldm.flux.controlnet.ControlNetFlux, latent_input=True,
                   control_latent_channels=16, **options, **FLUX.config)
    return in_names_of_diffusers(values, "flux-dev")


def flux_union() -> dict[str, torch.Tensor]:
    return flux_diffusers(num_union_modes=8)


def flux_mistoline() -> dict[str, torch.Tensor]:
    """As TheMistoAI writes it: in a Flux's own names, with a hint of pixels."""
    values = build_weights(comfy.ldm.flux.controlnet.ControlNetFlux, mistoline=True, **FLUX.config)
    return {name.replace("_norm.weight", "_norm.scale").replace(
        "controlnet_single_blocks.", "single_controlnet_blocks."): value
        for name, value in values.items()}


@functools.cache
def sd35_stability(is_large: bool) -> dict[str, torch.Tensor]:
    """As Stability writes them for SD 3.5; is_large: with pooled text as the model embeds it."""
    values = build_weights(comfy.cldm.dit_embedder.ControlNetEmbedder, img_size=None, patch_size=2,
                           in_chans=16, num_layers=2, main_model_double=4, double_y_emb=is_large,
                           attention_head_dim=64, num_attention_heads=4, adm_in_channels=2048)
    # the host takes these of the model that is guided
    of_model = "orig_y_embedder." if is_large else "x_embedder."
    return {name: value for name, value in values.items() if not name.startswith(of_model)}


@functools.cache
def qwen_fun() -> dict[str, torch.Tensor]:
    if not hasattr(comfy.ldm.qwen_image.controlnet, "QwenImageFunControlNetModel"):
        pytest.skip("this ComfyUI has no ControlNets of Qwen-Image Fun")
    return build_weights(comfy.ldm.qwen_image.controlnet.QwenImageFunControlNetModel,
                         inner_dim=256, num_attention_heads=2, attention_head_dim=128)


HUNYUAN_DIT = {
    "hidden_size": 256, "num_heads": 2, "text_states_dim": 256, "text_states_dim_t5": 256
}


@functools.cache
def hunyuan_dit() -> dict[str, torch.Tensor]:
    return build_weights(comfy.ldm.hydit.controlnet.HunYuanControlNet, **HUNYUAN_DIT)


class Latents:
    """A VAE without weights: latents of an eighth of a picture's size."""

    def __init__(self, channels: int = 16):
        self.channels = channels

    def encode(self, pictures):
        small = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8)
        return small.repeat(1, 6, 1, 1)[:, :self.channels]

    def spacial_compression_encode(self):
        return 8


class FrameLatents(Latents):
    """The same for a model of videos: with a dimension of time."""

    def encode(self, pictures):
        return super().encode(pictures).unsqueeze(2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """weights: of the file. base: the model it guides, one of `host_nodes.MODELS`. vae: of its
    hint. union: whether it takes a type of hint."""

    weights: Callable[[], Mapping[str, torch.Tensor]]
    base: str
    vae: Any = None
    union: bool = False


KINDS = {
    "sd1.5": Kind(ldm, "unet"),
    "sd1.5 with a prefix": Kind(ldm_with_prefix, "unet"),
    "sdxl": Kind(sdxl, "sdxl"),
    "sd3 of diffusers": Kind(sd3_diffusers, "sd3.5", Latents()),
    "sd3 inpainting of diffusers": Kind(
        functools.partial(sd3_diffusers, 17), "sd3.5", Latents()),
    "sd3.5 medium of Stability": Kind(
        functools.partial(sd35_stability, False), "sd3.5-wide", Latents()),
    "sd3.5 large of Stability": Kind(
        functools.partial(sd35_stability, True), "sd3.5-wide", Latents()),
    "qwen-image": Kind(qwen, "qwen-image", FrameLatents()),
    "qwen-image fun": Kind(qwen_fun, "qwen-image", FrameLatents()),
    "hunyuan-dit": Kind(hunyuan_dit, "hunyuan-dit-40", Latents(4)),
    "flux": Kind(flux_bfl, "flux-dev"),
    "flux mistoline": Kind(flux_mistoline, "flux-dev"),
    "flux of diffusers": Kind(flux_diffusers, "flux-dev", Latents()),
    "flux union": Kind(flux_union, "flux-dev", Latents(), union=True),
}


def shrunken_controlnet(kind: Kind, monkeypatch):
    """Let the host build model and ControlNet of a kind in the sizes of these tests."""
    shrunken_detection(MODELS[kind.base], monkeypatch)
    build = comfy.ldm.hydit.controlnet.HunYuanControlNet
    monkeypatch.setattr(comfy.ldm.hydit.controlnet, "HunYuanControlNet",
                        functools.partial(build, **HUNYUAN_DIT))


def write_svdquant(path, weights):
    return nunchaku_writer.write(path, nunchaku_writer.flux(weights))


FORMATS = {
    **PACKED_FILES, "SVDQuant": (write_svdquant, "net.safetensors"),
    "SDNQ": (functools.partial(write_sdnq, config={"_class_name": "FluxControlNetModel"}), "net"),
}


def apply_controlnet(positive, negative, control_net, hint, vae) -> tuple:
    """What the host's Apply ControlNet makes of conditioning."""
    return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, control_net, hint, 0.8, 0.0, 1.0, vae=vae)


def sample(kind: Kind, control_net=None, packed_base: bool = False,
           apply: Callable = apply_controlnet) -> torch.Tensor:
    """Two steps of the host's sampler on its own dense model, or on a packed one."""
    family, model = MODELS[kind.base], models(kind.base)[not packed_base]
    positive, negative = (conditioning(kind.base, seed) for seed in (2, 3))
    if control_net is not None:
        if kind.union:
            control_net = control_net.copy()
            control_net.set_extra_arg("control_type", [3])
        hint = seeded(1, 128, 128, 3, seed=9).abs() % 1
        positive, negative = apply(positive, negative, control_net, hint, kind.vae)
    # a part of the latent, which takes a quarter of the time
    noise, latent = (seeded(*family.latent, seed=seed)[..., :8, :8] for seed in (1, 4))
    return two_steps(model, 3.0, noise, latent / 2, positive, negative)


@functools.cache
def unguided(base: str) -> torch.Tensor:
    """What `sample` gives on the dense model without a ControlNet."""
    return sample(next(kind for kind in KINDS.values() if kind.base == base))


def packed_layers(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules()
            if isinstance(layer, PackedLayer) and is_packed(layer.weight)
            and layer.weight.params.format.plain_dtype is None]
