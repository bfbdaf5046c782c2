"""Runs of a model for measuring it: pictures drawn by the host's own sampler, and steps of them
that can be run again."""
import dataclasses
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sample
import torch

from ...files.container import WeightFileError
from ...out_of_memory import is_out_of_memory

PICTURE = 512  # pixels along each side where no latent is given
WIDTHS = {"text": 3, "pooled": 5}  # of the first try for a prompt of noise: sizes that no model has
TOKENS = 77  # of it; some models take no other number
# how many of the tokens are its own: encoders give the others, padding, nearly one vector
WORDS = range(4, 40)


def stop_where_cancelled():
    """Raises the host's InterruptProcessingException, which is not an Exception, once the user has
    cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def load(patcher, free: int = 0):
    """Have the host put a model where it runs, with what is patched onto it. free: bytes that are
    to stay free there."""
    comfy.model_management.load_models_gpu([patcher], memory_required=free)


def free_memory(device: torch.device) -> float:
    """Bytes that are free there, without end on a CPU."""
    return float("inf") if device.type == "cpu" else comfy.model_management.get_free_memory(device)


@dataclasses.dataclass(frozen=True)
class SamplingStep:
    """What the sampler gives the model at one step of a picture.

    x: noisy latents (B, C, ...). sigma: noise levels, float (B,). given: the further arguments of
    the host's `apply_model`.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    given: dict

    def run(self, model) -> torch.Tensor:
        """What the model takes off the noisy latents for each unit of noise, float32 like `x`: a
        flow model's velocity, the noise that a denoising one sees. model: the host's BaseModel, on
        its device."""
        denoised = model.apply_model(self.x, self.sigma, **self.given).float()
        return (self.x - denoised) / self.sigma.view(-1, *[1] * (self.x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class SamplingRun:
    """How pictures are drawn for a measurement.

    prompts: the host's CONDITIONINGs, which the pictures take in turn. latent: the host's LATENT,
    or None for one picture of `PICTURE` pixels, a video being one frame. negative, cfg: as the
    host's sampler takes them. samples: how many times it draws, all pictures of the latent at once.
    steps: of each time.
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
        """How many steps there are at most."""
        return self.samples * self.steps

    def run(self, patcher, seen: Callable[[int, SamplingStep], None]):
        """Draw; `seen` gets the number of each step and the step, before the model does. Nothing is
        changed on `patcher`."""
        patcher, count = patcher.clone(), 0
        wrapped = patcher.model_options.get("model_function_wrapper")

        def watched(apply_model, call):
            nonlocal count
            stop_where_cancelled()
            seen(count, SamplingStep(call["input"], call["timestep"], call["c"]))
            count += 1
            if wrapped is not None:
                return wrapped(apply_model, call)
            return apply_model(call["input"], call["timestep"], **call["c"])

        patcher.set_model_unet_function_wrapper(watched)
        for sample in range(self.samples):
            prompt, seed = self.prompts[sample % len(self.prompts)], self.seed + sample
            latent = latent_for(patcher, self.latent, pictures_of(prompt))
            noise = comfy.sample.prepare_noise(latent, seed)
            comfy.sample.sample(patcher, noise, self.steps, self.cfg, "euler", "simple", prompt,
                                self.negative or prompt, latent, disable_pbar=True, seed=seed)


def latent_for(patcher, latent: dict | None, count: int) -> torch.Tensor:
    """The latents that noise is added to: those given or empty ones, (B, C, ...), B being `count`
    where that is more."""
    if latent is not None:
        return _repeated(comfy.sample.fix_empty_latent_channels(patcher, latent["samples"]), count)
    latent_format = patcher.get_model_object("latent_format")
    side = max(1, PICTURE // latent_format.spacial_downscale_ratio)
    shape = {1: (side * 4,), 2: (side, side), 3: (1, side, side)}[latent_format.latent_dimensions]
    return torch.zeros(count, latent_format.latent_channels, *shape, dtype=torch.float32)


def _repeated(latent, count: int):
    return (
        latent
        if latent.is_nested or len(latent) >= count
        else latent.repeat(count, *[1] * (latent.ndim - 1))[:count]
    )


def pictures_of(prompt: list) -> int:
    """For how many pictures a CONDITIONING is: more than one where its texts are joined along the
    first dimension."""
    return max(len(text) for text, _ in prompt)


class _StopProbe(Exception):
    """A layer got inputs of another width than it takes."""

    def __init__(self, given: int, wanted: int):
        self.given = given
        self.wanted = wanted


def random_conditioning(patcher, drawing: SamplingRun, count: int) -> list[list]:
    """CONDITIONINGs of random numbers, for a model that is to be measured without a prompt.

    How wide a model wants its text, and the vector of all of it, stands nowhere in the host: the
    first layer that refuses a width says which one it takes. Raises WeightFileError for models that
    take more than these two.
    """
    for masked in (False, True):  # some cannot do without an attention mask, some take none
        widths = _probe_widths(patcher, drawing, masked)
        if widths is not None:
            latent = latent_for(patcher, drawing.latent, 1)
            pictures = 1 if latent.is_nested else len(latent)  # each gets a prompt of its own
            return [_noise(widths, seed, masked, pictures) for seed in range(count)]
    raise WeightFileError(
        f"{type(patcher.model).__name__} cannot be measured without a prompt: it takes more than"
        " one text. Connect positive, and a latent where the model draws something else than"
        " pictures.")


def _probe_widths(patcher, drawing: SamplingRun, masked: bool) -> dict[str, int] | None:
    """The widths of a prompt that a model runs with, or None where none is found."""
    widths = dict(WIDTHS)
    for _ in range(4):
        try:
            with _WidthProbe(patcher.model.diffusion_model):
                prompts = [_noise(widths, 0, masked)]
                dataclasses.replace(drawing, prompts=prompts, samples=1,
                                    steps=1).run(patcher, lambda *_: None)
            return widths
        except _StopProbe as refused:
            # The pooled text may stand among other numbers in what a layer gets.
            unknown = [name for name in ("text", "pooled") if widths[name] == WIDTHS[name]
                       and (refused.given == widths[name] or name == "pooled")]
            missing = refused.wanted - refused.given
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
    for text, words in zip(
            texts,
            torch.randint(WORDS.start, WORDS.stop, (pictures,), generator=generator).tolist()):
        text[words:] = text[words - 1]
    return [[
        texts, {
            "pooled_output": torch.randn(pictures, widths["pooled"], generator=generator,
                                         dtype=torch.float32)
        } |
        ({"attention_mask": torch.ones(pictures, TOKENS, dtype=torch.float32)} if masked else {})
    ]]


class _WidthProbe:
    """While entered, layers of `module` raise `_StopProbe` for inputs of another width than
    theirs."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self):
        self.handles = [
            layer.register_forward_pre_hook(self.check) for layer in self.module.modules()
            if isinstance(layer, torch.nn.Linear) or hasattr(layer, "normalized_shape")
        ]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def check(layer, inputs):
        wanted = (
            layer.in_features if isinstance(layer, torch.nn.Linear) else layer.normalized_shape[-1]
        )
        if inputs and inputs[0].shape[-1] != wanted:
            raise _StopProbe(inputs[0].shape[-1], wanted)
