"""The host's diffusion models at sizes a test can afford, built from the host's own classes.

A family's weights are random with a fixed seed, under the names the host's model gives them. Rows divide by 32 and mostly
by 256, so that every format of ggml can pack them.
"""
import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.supported_models
import torch


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    host_class: the class of `patcher.model` the host must choose. supported: the host's entry in `supported_models`.
    config: the shrunken configuration. latent, context: shapes of the model's main inputs. extra: further arguments of
    `apply_model`, a shape for random values. fixed: names in `config` whose value the host does not read from a file;
    such a model runs only with the host's answer corrected (see `shrunken_detection`).
    """

    host_class: str
    supported: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    context: tuple[int, ...] | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()


def host_model(family: Family, config: Mapping[str, Any], device: str = "cpu") -> torch.nn.Module:
    """The host's own module for a configuration, as its loader would build it, with uninitialised float32 weights."""
    model_config = getattr(comfy.supported_models, family.supported)({**config})
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = comfy.ops.disable_weight_init
    return model_config.get_model({}, "", device=device).diffusion_model


def random_weights(family: Family) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor of the shrunken model."""
    generator = torch.Generator().manual_seed(0)
    model = host_model(family, family.config)
    weights = model.state_dict()  # buffers keep their values
    for name, param in model.named_parameters():
        values = torch.randn(param.shape, generator=generator)
        if param.ndim > 1:
            values *= min(0.05, (param.shape[0] / param.numel()) ** 0.5)
        else:
            values = values * 0.05 + ("norm" in name and not name.endswith("bias"))
        weights[name] = values
    return weights


def full_width_shapes(family: Family) -> dict[str, torch.Size]:
    """Name -> shape of the model with the few blocks of the shrunken one and the widths the host insists on."""
    shrunken = {name: param for name, param in host_model(family, family.config, "meta").state_dict().items()}
    config = comfy.model_detection.detect_unet_config(shrunken, "")
    return {name: param.shape for name, param in host_model(family, config, "meta").state_dict().items()}


def shrunken_detection(family: Family, monkeypatch):
    """Let the host's detection answer with the family's size where it would answer with a size it holds fixed."""
    detect = comfy.model_detection.detect_unet_config

    def detect_shrunken(*args, **kwargs):
        config = detect(*args, **kwargs)
        if config is not None:
            config.update({name: family.config[name] for name in family.fixed})
        return config

    if family.fixed:
        monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_shrunken)


def inputs(family: Family) -> dict[str, Any]:
    """Arguments of `apply_model`."""
    generator = torch.Generator().manual_seed(1)

    def value(shape):
        return torch.randn(shape, generator=generator) if isinstance(shape, tuple) else shape

    arguments = {"x": value(family.latent), "t": torch.tensor([0.5])}
    if family.context is not None:
        arguments["c_crossattn"] = value(family.context)
    return arguments | {name: value(shape) for name, shape in family.extra.items()}


_FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, context_in_dim=256, hidden_size=256, mlp_ratio=4.0,
    num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[],
)

FAMILIES = {
    "flux-schnell": Family(
        "comfy.model_base.Flux", "FluxSchnell", {**_FLUX, "vec_in_dim": None, "guidance_embed": False},
        latent=(1, 16, 8, 8), context=(1, 7, 256)),
    "flux-dev": Family(
        "comfy.model_base.Flux", "Flux", {**_FLUX, "vec_in_dim": 256, "guidance_embed": True},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"y": (1, 256), "guidance": torch.tensor([3.5])}),
}
