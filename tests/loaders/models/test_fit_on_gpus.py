"""*fit this GPU* on GPUs of 6 to 24 GB: what is chosen stays on the GPU while it samples, with two
LoRAs and a ControlNet, after a text encoder; and what is larger does not fit.

Models and GPUs are scaled, see `scaled_gpus`. Pages of dynamic VRAM, of 32 MiB, are not: a GPU has
PAGES more there, and a Flux that is twice as wide.
"""
import dataclasses
import functools
import gc
from pathlib import Path

import comfy.controlnet
import comfy.memory_management
import comfy.model_management
import comfy.ops
import comfy.sample
import dynamic_vram
import pytest
import scaled_gpus
import torch
from gpu_memory import empty_gpus, lies_on
from lora_models import pairs
from patched_models import folder, parts, patched
from scaled_gpus import HALF_BYTES, ScaledModel
from small_encoders import encode, small_t5

from featherweight.loaders.files import packed_cache
from featherweight.loaders.inspect.model_summary import PACK_STATS_KEY
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.fit_device import FIT, fit_model, fit_text
from featherweight.loaders.models.pack_on_load import size_of_target, size_target
from featherweight.loaders.packing.planning import fit
from featherweight.ops.patcher.residency import PAGE

STATIC, DYNAMIC = pytest.mark.fake_gpus, pytest.mark.fake_gpus(dynamic=True)
CARDS = (6, 8, 12, 16, 24)
ENCODER_BYTES = 5e9  # of a T5-XXL in Q8_0
ENCODER_LAYERS = 22  # of `small_t5`
INPUTS = 300_000  # bytes that two steps copy beside LoRAs
RANK = 4
LARGER = 1.08
PAGES = 2  # of dynamic VRAM: one that is not full, and one for the ControlNet


class Control(torch.nn.Module):
    """Layers of a ControlNet's size, whose result is dropped."""

    dtype = torch.bfloat16

    def __init__(self, nbytes: float):
        super().__init__()
        width, layers = 256, max(1, int(nbytes / HALF_BYTES / 256 ** 2))
        self.layers = torch.nn.ModuleList(
            comfy.ops.manual_cast.Linear(width, width, bias=False, dtype=self.dtype)
            for _ in range(layers))
        for layer in self.layers:
            layer.weight = torch.nn.Parameter(torch.randn(width, width).to(self.dtype) / width,
                                              requires_grad=False)

    def forward(self, x, hint, timesteps, context, **extra):
        values = torch.ones(1, self.layers[0].in_features, dtype=x.dtype, device=x.device)
        for layer in self.layers:
            values = layer(values)
        return {"input": [], "middle": [], "output": []}


@dataclasses.dataclass
class Card:
    """A scaled GPU.

    Attributes:
        model: that it is scaled for.
        gib: of the real one.
        counters: of the fake GPUs.
    """

    model: ScaledModel
    gib: float
    counters: object
    is_dynamic: bool

    @property
    def nbytes(self) -> int:
        pages = PAGES * PAGE if self.is_dynamic else 0
        return int(self.gib * fit.GIB) + pages

    def fill(self):
        """Sets its size, and puts on it what CUDA takes of a real one."""
        torch.cuda.synchronize()
        self.counters.set_capacity(self.nbytes)
        missing = int(fit.SYSTEM_BYTES) - self.counters.used()
        assert missing > 0, f"{self.counters.used()} bytes are left of earlier tests"
        self.system = torch.empty(missing, dtype=torch.uint8, device="cuda")


@pytest.fixture
def gpus(one_thread, monkeypatch):
    monkeypatch.setenv(packed_cache.FOLDER, str(Path(folder().name, "packed")))
    with scaled_gpus.packing_of_repeated_rows(), empty_gpus() as counters:
        yield counters
    comfy.model_management.reset_cast_buffers()


@functools.cache
def file_of(model: ScaledModel) -> str:
    """Returns the path of a model's file, which is written once."""
    return model.write(Path(folder().name, f"fit-{id(model)}.safetensors"))


@pytest.fixture
def make_card(gpus, monkeypatch):
    cards = []

    def make(model: ScaledModel, gib: float) -> Card:
        model.scale_host(monkeypatch)
        cards.append(Card(model, gib, gpus, comfy.memory_management.aimdo_enabled))
        cards[-1].fill()
        return cards[-1]

    yield make
    for card in cards:
        card.system = None


@dataclasses.dataclass
class Run:
    """What two samplings did.

    Attributes:
        copied: bytes that the second one copied to the GPU.
        uploads: modules that dynamic VRAM uploaded, until each call of the model.
        peak: bytes on the GPU at most.
    """

    copied: int
    uploads: list[int]
    peak: int


def loras(model: ScaledModel, nbytes: float) -> list[tuple[dict, float]]:
    """Two LoRAs of together so many bytes on the GPU at most."""
    layers, left = {}, nbytes / 2
    shapes = {name.removesuffix(".weight"): shape for name, shape in model.shapes.items()
              if len(shape) == 2 and "blocks." in name and name.endswith(".weight")}
    for name in sorted(shapes, key=hash_of):
        size = RANK * sum(shapes[name]) * 4
        if size <= left:
            layers[f"diffusion_model.{name}"] = shapes[name]
            left -= size
    assert layers
    return [(pairs(layers, rank=RANK), strength) for strength in (0.7, -0.4)]


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 7919 % 1009


def control_of(nbytes: float) -> comfy.controlnet.ControlNet:
    enabled = comfy.memory_management.aimdo_enabled
    comfy.memory_management.aimdo_enabled = False  # with it, layers have no weights until they load
    control = Control(nbytes)
    comfy.memory_management.aimdo_enabled = enabled
    return comfy.controlnet.ControlNet(control, load_device=torch.device("cuda:0"))


def sample(patcher, card: Card, control, uploads: list) -> list[int]:
    """Samples two steps, in each of which the bytes of the real model's step are taken.

    Returns:
        How many modules were uploaded until each call of the model.
    """
    counts = []
    model = card.model

    def step(apply, arguments):
        counts.append(len(uploads))
        batch = len(arguments["input"])
        nbytes = max(fit.MIN_STEP_BYTES, batch * model.step_bytes / model.scale)
        taken = torch.empty(int(nbytes), dtype=torch.uint8, device="cuda")
        result = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        del taken
        return result

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(step)
    positive, negative = model.conditioning(2), model.conditioning(3)
    hint = torch.zeros(1, 3, 64, 64)
    for condition in (positive, negative):
        if control is not None:
            condition[0][1].update(
                control=control.copy().set_cond_hint(hint, 0.8, (0.0, 1.0)),
                control_apply_to_uncond=False)
    noise = torch.randn(model.family.latent, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        result = comfy.sample.sample(
            patcher, noise, 2, 1.0 if card.is_dynamic else 2.0, "euler", "simple", positive,
            negative, torch.zeros_like(noise), seed=1, disable_pbar=True)
    assert result.isfinite().all()
    return counts


def run(patcher, card: Card, monkeypatch, lora_bytes: float, control_bytes: float) -> Run:
    """Samples twice, with two LoRAs and a ControlNet, after a text encoder."""
    uploads = dynamic_vram.uploads(monkeypatch) if card.is_dynamic else []
    clip, _ = small_t5("Q8_0", ENCODER_LAYERS, encoder_width(ENCODER_BYTES / card.model.scale))
    encode(clip)
    patcher = patched(patcher, *loras(card.model, lora_bytes))
    control = control_of(control_bytes)
    uploads.clear()
    card.counters.reset()
    counts = sample(patcher, card, control, uploads)
    peak = card.counters.peak()
    card.counters.reset()
    more = sample(patcher, card, control, uploads)
    copied = card.counters.copied().up
    print(f"{card.gib} GB: peak {peak / card.nbytes:.3f} of {card.nbytes / 1e6:.1f} MB, copied again"
          f" {copied / 1e6:.2f} MB, uploads {counts} {more}, text encoder"
          f" {clip.patcher.loaded_size() / 1e6:.1f} MB")
    return Run(copied, counts + more, max(peak, card.counters.peak()))


def encoder_width(nbytes: float) -> int:
    """Returns the width, in whole heads, of a T5 of so many bytes in Q8_0."""
    return 64 * max(2, round((nbytes / 1.06 / 16 / ENCODER_LAYERS) ** 0.5 / 64))


def off_the_gpu(patcher) -> int:
    """Returns the bytes of a model's weights that are not on the GPU."""
    weights = (*patcher.model.parameters(), *patcher.model.buffers())
    return sum(part.nbytes for weight in weights for part in parts(weight)
               if part.device.type != "cuda")


def is_whole(patcher, card: Card, done: Run, lora_bytes: float) -> bool:
    """Returns whether all weights stayed on the GPU."""
    if card.is_dynamic:
        first, *later = done.uploads
        return len(set(later)) == 1
    return not off_the_gpu(patcher) and done.copied <= 2 * lora_bytes + INPUTS


def check(model: ScaledModel, gib: int, make_card, monkeypatch):
    path = file_of(model)
    card = make_card(model, gib)
    patcher = load_diffusion_model(path, pack_to=FIT)
    fitted = fit_model([path], torch.device("cuda:0"), ())
    print(fit_text(patcher), fitted.targets, f"scale {model.scale:.1f}",
          f"model {patcher.model_size() / 1e6:.2f} MB")
    share = fit.BESIDE_SHARE * gib * fit.GIB
    done = run(patcher, card, monkeypatch, share / 2, share / 2)
    assert done.peak <= card.nbytes
    if "more than its weights may have" in fit_text(patcher):
        assert not is_whole(patcher, card, done, share / 2)
        return
    assert is_whole(patcher, card, done, share / 2)


FAMILIES = {"flux": scaled_gpus.flux(), "sdxl": scaled_gpus.sdxl(),
            "qwen-image": scaled_gpus.qwen_image(), "wan": scaled_gpus.wan(),
            "flux-wide": scaled_gpus.flux(512)}
@pytest.mark.parametrize("gib", CARDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it(name, gib, make_card, monkeypatch):
    check(FAMILIES[name], gib, make_card, monkeypatch)


pytestmark = STATIC
