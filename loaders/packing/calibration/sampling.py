"""Draws pictures with the host's sampler to measure a model; captured steps can run again."""
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import comfy.model_management
import comfy.sample
import torch

from ...container.weight_file import WeightFileError
from ...out_of_memory import is_out_of_memory

PICTURE = 512  # pixels along each side where no latent is given
# Random conditioning: the widths of the first try, which no model has; its tokens, of which some
# models take no other number; and how many of these differ. Encoders give padding, the others,
# nearly one vector.
WIDTHS = {"text": 3, "pooled": 5}
TOKENS = 77
WORDS = range(4, 40)


def stop_where_cancelled():
    """Raises the host's InterruptProcessingException (a BaseException) once the user has cancelled.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()


def load(patcher):
    """Has the host load a patched model to its device."""
    comfy.model_management.load_models_gpu([patcher])


def free_memory(device: torch.device) -> float:
    """Returns the free bytes of a device, infinity for the CPU."""
    if device.type == "cpu":
        return float("inf")
    return cast(float, comfy.model_management.get_free_memory(device))


@dataclasses.dataclass(frozen=True)
class SamplingStep:
    """What the sampler gives the model at one step of a picture.

    x: noisy latents (B, C, ...). sigma: noise levels, float (B,). arguments: the further arguments
    of the host's `apply_model`.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    arguments: dict

    def run(self, model) -> torch.Tensor:
        """Runs the host's BaseModel on its device.

        Returns:
            What the model subtracts from the noisy latents per unit of noise, float32 like `x`: the
            velocity of a flow model, the noise of one that denoises.
        """
        denoised = model.apply_model(self.x, self.sigma, **self.arguments).float()
        return (self.x - denoised) / self.sigma.view(-1, *[1] * (self.x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class SamplingRun:
    """How pictures are drawn for a measurement.

    Attributes:
        prompts: the host's CONDITIONINGs, which the samples take in turn.
        latent: the host's LATENT, None for one picture of PICTURE pixels or one frame of a video.
        negative, cfg: as the host's sampler takes them.
        samples: how often the sampler runs, each time for all pictures of the latent.
        steps: of one sample.
        seed: of the noise; each sample adds 1.
    """

    prompts: Sequence[list]
    latent: dict | None = None
    negative: list | None = None
    cfg: float = 1.0
    samples: int = 8
    steps: int = 12
    seed: int = 0

    @property
    def total(self) -> int:
        """The number of steps, at most."""
        return self.samples * self.steps

    def run(self, patcher, on_step: Callable[[int, SamplingStep], None]):
        """Draws with a clone of the host's ModelPatcher.

        Args:
            patcher: stays as it is.
            on_step: called with the number of each step and the step, before the model runs.
        """
        patcher = patcher.clone()
        number = 0
        inner_wrapper = patcher.model_options.get("model_function_wrapper")

        def wrapper(apply_model, call):
            nonlocal number
            stop_where_cancelled()
            on_step(number, SamplingStep(call["input"], call["timestep"], call["c"]))
            number += 1
            if inner_wrapper is not None:
                return inner_wrapper(apply_model, call)
            return apply_model(call["input"], call["timestep"], **call["c"])

        patcher.set_model_unet_function_wrapper(wrapper)
        for sample in range(self.samples):
            prompt, seed = self.prompts[sample % len(self.prompts)], self.seed + sample
            # as many pictures as the batch of its texts is for
            latent = latent_for(patcher, self.latent, max(len(text) for text, _ in prompt))
            noise = comfy.sample.prepare_noise(latent, seed)
            comfy.sample.sample(patcher, noise, self.steps, self.cfg, "euler", "simple", prompt,
                                self.negative or prompt, latent, disable_pbar=True, seed=seed)


def latent_for(patcher, latent: dict | None, count: int) -> torch.Tensor:
    """Returns the latents to which noise is added, (B, C, ...).

    Args:
        patcher: the host's ModelPatcher.
        latent: the host's LATENT, None for empty ones.
        count: pictures; latents of fewer are repeated.
    """
    if latent is not None:
        return _repeat(comfy.sample.fix_empty_latent_channels(patcher, latent["samples"]), count)
    latent_format = patcher.get_model_object("latent_format")
    side = max(1, PICTURE // latent_format.spacial_downscale_ratio)
    shape = {1: (side * 4,), 2: (side, side), 3: (1, side, side)}[latent_format.latent_dimensions]
    return torch.zeros(count, latent_format.latent_channels, *shape, dtype=torch.float32)


def _repeat(latent, count: int):
    if latent.is_nested or len(latent) >= count:
        return latent
    return latent.repeat(count, *[1] * (latent.ndim - 1))[:count]


class _StopProbe(Exception):
    """Raised when a layer gets inputs of another width than it takes."""

    def __init__(self, actual: int, expected: int):
        self.actual = actual
        self.expected = expected


def random_conditioning(patcher, sampling: SamplingRun, count: int) -> list[list]:
    """Returns CONDITIONINGs of random numbers, to measure a model without a prompt.

    The host does not tell the widths of a model's text and pooled text: the first layer that gets
    a wrong width tells the right one.

    Args:
        patcher: the host's ModelPatcher.
        sampling: how pictures are drawn.
        count: of the conditionings.

    Raises:
        WeightFileError: for models that take more than a text and a pooled text.
    """
    for masked in (False, True):  # some models need an attention mask, some take none
        widths = _probe_widths(patcher, sampling, masked)
        if widths is not None:
            latent = latent_for(patcher, sampling.latent, 1)
            pictures = 1 if latent.is_nested else len(latent)  # each has its own prompt
            return [_noise(widths, seed, masked, pictures) for seed in range(count)]
    raise WeightFileError(
        f"{type(patcher.model).__name__} cannot be measured without a prompt: it takes more than"
        " one text. Connect positive, and a latent if the model generates something other than"
        " images.")


def _probe_widths(patcher, sampling: SamplingRun, masked: bool) -> dict[str, int] | None:
    """Returns the widths of text and pooled text with which a model runs, None for none."""
    widths = dict(WIDTHS)
    for _ in range(4):
        try:
            with contextlib.ExitStack() as hooks:
                for layer in patcher.model.diffusion_model.modules():
                    if hasattr(layer, "in_features") or hasattr(layer, "normalized_shape"):
                        hooks.enter_context(layer.register_forward_pre_hook(_check_width))
                prompts = [_noise(widths, 0, masked)]
                probe = dataclasses.replace(sampling, prompts=prompts, samples=1, steps=1)
                probe.run(patcher, lambda *_: None)
            return widths
        except _StopProbe as stop:
            # A layer may get the pooled text joined to other numbers.
            unknown = [name for name in ("text", "pooled") if widths[name] == WIDTHS[name]
                       and (stop.actual == widths[name] or name == "pooled")]
            missing = stop.expected - stop.actual
            if not unknown or missing <= 0:
                return None
            widths[unknown[0]] += missing
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return None
    return None


def _noise(widths: dict[str, int], seed: int, masked: bool, pictures: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(pictures, TOKENS, widths["text"], generator=generator, dtype=torch.float32)
    counts = torch.randint(WORDS.start, WORDS.stop, (pictures,), generator=generator).tolist()
    for text, words in zip(texts, counts):
        text[words:] = text[words - 1]
    pooled = torch.randn(pictures, widths["pooled"], generator=generator, dtype=torch.float32)
    options = {"pooled_output": pooled}
    if masked:
        options["attention_mask"] = torch.ones(pictures, TOKENS, dtype=torch.float32)
    return [[texts, options]]


def _check_width(layer, inputs):
    is_linear = hasattr(layer, "in_features")  # the host's mixed ones are not torch's Linear
    expected = layer.in_features if is_linear else layer.normalized_shape[-1]
    if inputs and inputs[0].shape[-1] != expected:
        raise _StopProbe(inputs[0].shape[-1], expected)
