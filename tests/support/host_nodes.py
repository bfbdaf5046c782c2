"""Small packed models beside the host's dense ones, in the hands of the host's own nodes."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import comfy.cldm.cldm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_api.latest import io
from families import FAMILIES, comfyui_gguf_style, random_weights, shrunken_detection
from pack_api import load_diffusion_model
from patched_models import folder
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf

# Two levels of 320 and 640 channels, for nodes that look at the levels of a UNet.
UNET = dataclasses.replace(
    FAMILIES["sd1.5"],
    latent=(1, 4, 8, 8),
    config={
        **FAMILIES["sd1.5"].config,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [0, 1, 0, 1],
        "transformer_depth_middle": 1,
    },
)
# With the width of pooled text that the host takes ControlNets of Stability to have.
SD35 = dataclasses.replace(
    FAMILIES["sd3.5"],
    config={**FAMILIES["sd3.5"].config, "adm_in_channels": 2048},
    extra={"y": (1, 2048)},
)
# With as many blocks as the host takes the model of its ControlNets to have.
HUNYUAN_DIT = dataclasses.replace(
    FAMILIES["hunyuan-dit"], config={**FAMILIES["hunyuan-dit"].config, "depth": 40})
MODELS = {**FAMILIES, "unet": UNET, "sd3.5-wide": SD35, "hunyuan-dit-40": HUNYUAN_DIT}
# What conditioning holds beside the text, by family; a tuple is the shape of random values.
EXTRAS = {
    "sdxl": {"pooled_output": (1, 1280)},
    "sd3.5": {"pooled_output": (1, 256)},
    "sd3.5-wide": {"pooled_output": (1, 2048)},
    "flux-dev": {"pooled_output": (1, 768), "guidance": 3.5},
    "ltxv": {"attention_mask": torch.ones(1, 7, dtype=torch.long)},
    "mochi": {"attention_mask": torch.ones(1, 8, dtype=torch.long)},
    **{name: {"pooled_output": (1, 768)}
       for name in ("hunyuan-video", "hunyuan-video-1.5", "kandinsky5")},
    "hidream": {"pooled_output": (1, 256), "conditioning_llama3": (1, 2, 7, 256)},
    **{
        name: {
            "attention_mask": torch.ones(1, 77), "conditioning_mt5xl": (1, 256, 256),
            "attention_mask_mt5xl": torch.ones(1, 256)
        }
        for name in ("hunyuan-dit", "hunyuan-dit-40")
    },
    **{name: {"attention_mask": torch.ones(1, 7, dtype=torch.long)}
       for name in ("omnigen2", "boogu")},
    "ace-step": {"conditioning_lyrics": torch.arange(9)[None]},
    "ace-step-1.5": {"conditioning_lyrics": (1, 5, 1024)},
}


def conditioning(name: str, seed: int) -> list:
    """Random conditioning for a model, with what it needs beside the text."""
    extra = EXTRAS.get(name, {}).items()
    return [[
        seeded(*MODELS[name].context, seed=seed), {
            name: seeded(*value, seed=seed) if isinstance(value, tuple) else value
            for name, value in extra
        }
    ]]


def seeded(*shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_steps(model, cfg: float, noise, latent, *conditionings) -> torch.Tensor:
    """What the host's sampler makes of a latent in two steps."""
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, *conditionings, latent,
                                      disable_pbar=True, seed=1)


@functools.cache
def models(name: str, other: bool = False) -> tuple:
    """(packed, dense) patchers of the same values, each loaded from a file. other: with other
    values."""
    family, path = MODELS[name], f"{folder().name}/{name}-{other}"
    weights = random_weights(family)
    if other:
        weights = {
            key: values.flip(0) if values.ndim > 1 else values for key, values in weights.items()
        }
    seen = write_gguf(f"{path}.gguf", weights, **comfyui_gguf_style(), metadata=family.metadata)
    seen = {key: torch.as_tensor(values).contiguous() for key, values in seen.items()}
    save_file(seen, f"{path}.safetensors", metadata=dict(family.metadata))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        shrunken_detection(family, patch)
        return load_diffusion_model(f"{path}.gguf"), comfy.sd.load_diffusion_model(
            f"{path}.safetensors"
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """How a node is called.

    family: of the model, one of MODELS. inputs: those that are not given their default; a function
    gets the Setting. floats: of all other numbers, in place of their defaults. latent: shape, if
    not the family's. effect: whether a sampled picture must differ from that of the model without
    the node. noise_mask: whether a part of the picture is kept. limit: of the error.
    """

    family: str = "flux-schnell"
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    floats: float | None = None
    latent: tuple | None = None
    steps: int = 2
    cfg: float = 3.0
    effect: bool = True
    noise_mask: bool = False
    limit: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of the two models, and what the host's sampler is given with it."""

    case: Case
    packed: bool

    @property
    def model(self):
        return models(self.case.family)[not self.packed]

    @property
    def other_model(self):
        return models(self.case.family, other=True)[not self.packed]

    @property
    def latent(self) -> torch.Tensor:
        return seeded(*(self.case.latent or MODELS[self.case.family].latent), seed=4) / 2

    def conditioning(self, seed: int) -> list:
        return conditioning(self.case.family, seed)

    def sigmas(self, model=None) -> torch.Tensor:
        sampling = (model or self.model).get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "simple", self.case.steps)

    def value(self, name: str, kind, options: dict):
        """What an input is given: the case's own value, its default, or what its type stands for
        here."""
        if name in self.case.inputs:
            given = self.case.inputs[name]
            return given(self) if isinstance(given, Callable) else given
        if kind == "FLOAT" and self.case.floats is not None:
            return self.case.floats
        if "default" in options:
            return options["default"]
        if isinstance(kind, list) or kind == "COMBO":
            return (kind if isinstance(kind, list) else options["options"])[0]
        # The second of two models, and each conditioning, has values of its own.
        seeds = {
            "positive": 2, "conditioning": 2, "cond1": 2, "negative": 3, "cond2": 5,
            "empty_conditioning": 6
        }
        given = {
            "MODEL": lambda: self.other_model
            if name in ("model2", "model_negative") else self.model,
            "CONDITIONING": lambda: self.conditioning(seeds[name]),
            "LATENT": lambda: {"samples": self.latent}, "SIGMAS": self.sigmas,
            "BOOLEAN": lambda: False, "SAMPLER": lambda: comfy.samplers.sampler_object("euler")
        }
        return given[kind]()

    def sample(self, model, sampler=None) -> torch.Tensor:
        """A few steps of the host's sampler."""
        mask = (
            torch.linspace(0, 1, self.latent.shape[-1]).expand(1, *self.latent.shape[-2:])
            if self.case.noise_mask
            else None
        )
        sampler = sampler or comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(model, seeded(*self.latent.shape), self.case.cfg, sampler,
                                          self.sigmas(model), self.conditioning(2),
                                          self.conditioning(3), self.latent, noise_mask=mask,
                                          disable_pbar=True, seed=1)

    def guided(self, guider) -> torch.Tensor:
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(seeded(*self.latent.shape), self.latent, sampler, self.sigmas(),
                             disable_pbar=True, seed=1)


def schema(node: type) -> dict[str, tuple]:
    """Name -> (type or list of choices, options) of a node's inputs."""
    sections = node.INPUT_TYPES()
    inputs = sections.get("required", {}) | sections.get("optional", {})
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in inputs.items()}


def execute(node: type, setting: Setting) -> list[tuple[str, Any]]:
    """(type, value) of each output of a node, run as the host runs it. Optional inputs are those
    that the case names."""
    required = node.INPUT_TYPES().get("required", {})
    inputs = {name: setting.value(name, *spec) for name, spec in schema(node).items()
              if name in required or name in setting.case.inputs}
    if getattr(node, "INPUT_IS_LIST", False):
        inputs = {name: [value] for name, value in inputs.items()}
    torch.manual_seed(0)
    if issubclass(node, io.ComfyNode):
        values = node.EXECUTE_NORMALIZED(**inputs).result or ()
    else:
        values = getattr(node(), node.FUNCTION)(**inputs)
        values = values.get("result", ()) if isinstance(values, dict) else values
    return list(zip(node.RETURN_TYPES, values))


def observed(kind: str, value, setting: Setting) -> dict[str, torch.Tensor]:
    """Name -> numbers in which two outputs can be compared; a model, a guider and a sampler are
    run."""
    runs = {
        "MODEL": setting.sample, "GUIDER": setting.guided,
        "LATENT": lambda latent: latent["samples"],
        "SAMPLER": lambda sampler: setting.sample(setting.model, sampler)
    }
    if kind in runs:
        return {kind: runs[kind](value)}
    if kind in ("SIGMAS", "FLOAT"):
        return {kind: torch.as_tensor(value, dtype=torch.float32)}
    if kind == "CONTROL_NET":
        return dict(value.control_model.state_dict())
    if kind == "LORA_MODEL":
        return value
    return {}


# --- what some nodes take beside a model ---


def lora(setting: Setting) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(values) for name, values in tiny_models.flux_lora(
            seed=5, part="blocks", layer="lora_unet_{flat}", down=".lora_down.weight",
            up=".lora_up.weight", strength=0.3, hidden=256, double_blocks=1, single_blocks=1,
            context=256).items()
    }


@functools.cache
def vae() -> comfy.sd.VAE:
    with torch.inference_mode():
        return comfy.sd.VAE(
            {name: torch.from_numpy(values) for name, values in tiny_models.autoencoder().items()})


class FrameVae:
    """The autoencoder as one of videos: its latents have a dimension of time."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return vae().encode(pictures).unsqueeze(2)

    def spacial_compression_encode(self) -> int:
        return vae().spacial_compression_encode()


@functools.cache
def difference_controlnet() -> str:
    """Path of a ControlNet for the model "unet" whose weights are to be added to the model's."""
    config = {name: value for name, value in UNET.config.items() if name != "out_channels"}
    module = comfy.cldm.cldm.ControlNet(hint_channels=3, num_heads=8, **config)
    weights = {f"control_model.{name}": seeded(*value.shape, seed=index) * 0.05
               for index, (name, value) in enumerate(module.state_dict().items())}
    torch.save(weights | {"difference": torch.ones(1)}, f"{folder().name}/controlnet.pth")
    return f"{folder().name}/controlnet.pth"


def image(*size: int) -> torch.Tensor:
    return seeded(1, *size, 3).abs() % 1


def model_patch(module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A small module of the host with seeded weights, as its loader of model patches gives it."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data = seeded(*parameter.shape, seed=index) * 0.1
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(module, load_device=device, offload_device=device)
