"""*fit this GPU* on GPUs of 6 to 24 GB: what is chosen stays on the GPU while it samples, with two
LoRAs and a ControlNet, after a text encoder; and what is larger does not fit.

Models and GPUs are scaled, see `scaled_gpus`. Pages of dynamic VRAM, of 32 MiB, are not, nor is
what comfy-aimdo keeps free: there a GPU has PAGES and HEADROOM more, the Flux is twice as wide, and
what is larger is larger by these pages too.

ComfyUI computes in 16 bits here, with torch's reference in place of kernels.
"""
import dataclasses
import functools
import gc
import random
import re
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
from comfy_aimdo.model_vbar import vbars_reset_watermark_limits
from gpu_memory import empty_gpus
from lora_models import pairs
from pack_api import FORMATS, load_diffusion_model, pack_tensor
from patched_models import folder, parts, patched
from scaled_gpus import HALF_BYTES, ScaledModel
from small_encoders import encode, small_t5

from featherweight.loaders.comfyui.model_summary import PACK_STATS_KEY
from featherweight.loaders.files import packed_cache
from featherweight.loaders.models.fit_device import FIT, Targets, fit_text, model_targets
from featherweight.loaders.packing.planning import for_device
from featherweight.loaders.packing.planning.plan import types_for
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.patcher.residency import PAGE

STATIC, DYNAMIC = pytest.mark.fake_gpus, pytest.mark.fake_gpus(dynamic=True)
CARDS = (6, 8, 12, 16, 24)
GPU = torch.device("cuda:0")
ENCODER_BYTES = 5e9  # of a T5-XXL in Q8_0
ENCODER_LAYERS = 22  # of `small_t5`
VIDEO_STEP_BYTES = 4 << 30  # are more than a step of an image takes
INPUTS = 300_000  # bytes that two steps copy in addition to LoRAs
RANK = 4
LARGER = 1.1  # times the size that was chosen: the share for LoRAs is not full here
HEADROOM = 384 << 20  # bytes that comfy-aimdo keeps free on a GPU of any size, see `unscaled`
BY_TORCH = 96 << 20  # bytes
PAGES = 3  # of dynamic VRAM: of the model, of its LoRAs and of the ControlNet one each is not full

MODELS = {"flux": scaled_gpus.flux(), "wide flux": scaled_gpus.flux(512),
          "shallow flux": scaled_gpus.flux(depth=2, single=4), "sdxl": scaled_gpus.sdxl(),
          "qwen-image": scaled_gpus.qwen_image(), "wan": scaled_gpus.wan(512)}


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
        left: bytes that earlier tests of this process left on it, beyond those of CUDA.
    """

    model: ScaledModel
    gib: float
    counters: object
    is_dynamic: bool
    left: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the scaled GPU."""
        return int(self.gib * for_device.GIB)

    @property
    def pages(self) -> int:
        """Bytes of the pages of dynamic VRAM that are not full."""
        return PAGES * PAGE if self.is_dynamic else 0

    @property
    def lora_bytes(self) -> float:
        """Bytes for LoRAs and a ControlNet."""
        return for_device.LORA_SHARE * self.nbytes

    @property
    def unscaled(self) -> int:
        """Bytes that the fake one has more.

        comfy-aimdo frees pages until 256 MiB are free, and 128 MiB more when torch allocates.
        """
        headroom = HEADROOM * (1 - 1 / self.model.scale)
        return self.left + (int(headroom) + self.pages if self.is_dynamic else 0)

    def fill(self):
        """Sets its size, and puts on it what CUDA takes of a real one."""
        torch.cuda.synchronize()
        missing = int(for_device.SYSTEM_BYTES) - self.counters.used()
        self.left = max(0, -missing)
        self.counters.set_capacity(self.nbytes + self.unscaled)
        self.system = torch.empty(max(0, missing), dtype=torch.uint8, device="cuda")


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
        card = Card(model, gib, gpus, comfy.memory_management.aimdo_enabled)
        cards.append(card)
        total = comfy.model_management.get_total_memory
        monkeypatch.setattr(comfy.model_management, "get_total_memory",
                            lambda *args, **options: total(*args, **options) - card.unscaled)
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
        uploads: layers of the model that dynamic VRAM uploaded, until each call of the model.
        control_uploads: the same of the ControlNet.
        peak: bytes on the GPU at most.
    """

    copied: int
    uploads: list[int]
    control_uploads: list[int]
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
    """Returns a number by which layers are in no order."""
    return sum(map(ord, name)) * 7919 % 1009


def control_of(nbytes: float) -> comfy.controlnet.ControlNet:
    """Returns a ControlNet of so many bytes at most."""
    enabled = comfy.memory_management.aimdo_enabled
    comfy.memory_management.aimdo_enabled = False  # with it, layers have no weights until they load
    control = Control(nbytes)
    comfy.memory_management.aimdo_enabled = enabled
    return comfy.controlnet.ControlNet(control, load_device=torch.device("cuda:0"))


def sample(patcher, card: Card, control, uploads: list) -> list[list]:
    """Samples two steps, in each of which the bytes of the real model's step are taken.

    With guidance, except for videos in dynamic VRAM: there the host computes both parts at once if
    they would fit without the weights, and then copies weights in each step.

    Returns:
        The modules that were uploaded until each call of the model.
    """
    counts, model = [], card.model

    def step(apply, arguments):
        counts.append(list(uploads))
        batch = len(arguments["input"])
        nbytes = max(for_device.MIN_STEP_BYTES, batch * model.step_bytes / model.scale)
        taken = torch.empty(int(nbytes), dtype=torch.uint8, device="cuda")
        result = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        del taken
        return result

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(step)
    positive, negative = model.conditioning(2), model.conditioning(3)
    hinted = control.copy().set_cond_hint(torch.zeros(1, 3, 64, 64), 0.8, (0.0, 1.0))
    for condition in (positive, negative):
        condition[0][1].update(control=hinted, control_apply_to_uncond=False)
    guidance = 1.0 if card.is_dynamic and model.step_bytes > VIDEO_STEP_BYTES else 2.0
    noise = torch.randn(model.family.latent, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        result = comfy.sample.sample(
            patcher, noise, 2, guidance, "euler", "simple", positive,
            negative, torch.zeros_like(noise), seed=1, disable_pbar=True)
    end_node()
    assert result.isfinite().all()
    return counts


def end_node():
    """Frees what the host frees after each node."""
    if comfy.memory_management.aimdo_enabled:
        comfy.model_management.reset_cast_buffers()
        vbars_reset_watermark_limits()


def run(patcher, card: Card, monkeypatch) -> Run:
    """Samples twice, with two LoRAs and a ControlNet, after a text encoder."""
    uploads = dynamic_vram.uploads(monkeypatch) if card.is_dynamic else []
    clip, _ = small_t5("Q8_0", ENCODER_LAYERS, encoder_width(ENCODER_BYTES / card.model.scale))
    encode(clip)
    end_node()
    patcher = patched(patcher, *loras(card.model, card.lora_bytes / 2))
    control = control_of(card.lora_bytes / 2)
    uploads.clear()
    card.counters.reset()
    counts = sample(patcher, card, control, uploads)
    peak = card.counters.peak()
    card.counters.reset()
    counts += sample(patcher, card, control, uploads)
    own = set(patcher.model.modules())
    of_model = [sum(module in own for module in modules) for modules in counts]
    of_control = [len(modules) - count for modules, count in zip(counts, of_model, strict=True)]
    done = Run(card.counters.copied().up, of_model, of_control, max(peak, card.counters.peak()))
    print(card.gib, f"GB, {card.nbytes / 1e6:.1f} MB:", done)  # for whoever runs it with `-s`
    return done


def encoder_width(nbytes: float) -> int:
    """Returns the width, in whole heads, of a T5 of so many bytes in Q8_0."""
    return 64 * max(2, round((nbytes / 1.06 / 16 / ENCODER_LAYERS) ** 0.5 / 64))


def off_the_gpu(patcher) -> int:
    """Returns the bytes of a model's weights that are not on the GPU."""
    weights = (*patcher.model.parameters(), *patcher.model.buffers())
    return sum(part.nbytes for weight in weights for part in parts(weight)
               if part.device.type != "cuda")


def is_whole(patcher, card: Card, done: Run) -> bool:
    """Returns whether all weights stayed on the GPU after the first step."""
    if card.is_dynamic:
        return len(set(done.uploads[1:])) == 1
    if off_the_gpu(patcher):
        return False
    assert done.copied <= card.lora_bytes / 2 + INPUTS and done.peak <= card.nbytes + card.left
    return True


def check(model: ScaledModel, gib: int, make_card, monkeypatch) -> tuple[Card, Targets]:
    """Checks that what is chosen for a GPU stays there, or that it says what it lacks."""
    path, real = file_of(model), model.real_choice(gib)
    card = make_card(model, gib)
    patcher = load_diffusion_model(path, pack_to=FIT)
    fitted = model_targets(FIT, [path], GPU, ())
    assert fit_text(patcher) == fitted.text
    assert kind_of(fitted.files[0]) == kind_of(real.target or None)
    done = run(patcher, card, monkeypatch)
    if real.copied:
        copied = bytes_copied(fitted)
        assert f"{fitted.copying}: Place Model" in fitted.text
        if copied > card.pages:  # that dynamic VRAM has more here
            assert not is_whole(patcher, card, done)
        if not card.is_dynamic:  # whose pages are not scaled
            largest = max(sum(part.nbytes for part in parts(weight))
                          for weight in patcher.model.parameters())
            near = max(0.05 * copied, 2 * largest)
            in_a_call = done.copied / (len(done.uploads) / 2)
            # the share for LoRAs and a ControlNet is not full here
            assert copied - card.lora_bytes - near < in_a_call < copied + near
    else:
        assert is_whole(patcher, card, done)
        # not at once: comfy-aimdo looks at a GPU's memory every two seconds
        assert len(set(done.control_uploads[2:])) <= 1
    return card, fitted


def bytes_copied(fitted: Targets) -> float:
    """Returns the bytes that each step is said to copy."""
    size, unit = re.match(r"([\d.]+) ([GMK]B) copied in each step", fitted.copying).groups()
    return float(size) * {"GB": 1e9, "MB": 1e6, "KB": 1e3}[unit]


def kind_of(target: str | int | None) -> str:
    """Returns what a choice is: a type, a size, or nothing for the file as it is."""
    if isinstance(target, int):
        return "size"
    return target or ""


def check_larger(card: Card, fitted: Targets, monkeypatch):
    """Checks that the next larger choice does not stay on the GPU: a size a little larger, or the
    file as it is."""
    target, size = None, fitted.files[0]
    if isinstance(size, int):
        target = int(LARGER * size) + card.pages
    patcher = load_diffusion_model(file_of(card.model), pack_to=target)
    assert not is_whole(patcher, card, run(patcher, card, monkeypatch))


# the first has a tenth of Flux's blocks, of the same proportions
NORMAL = [pytest.param(name, gib, marks=STATIC, id=f"{name}-{gib}-static")
          for name, gib in (("shallow flux", 8), ("flux", 24))]
ALL = [pytest.param(name, gib, marks=[mark, pytest.mark.heavy], id=f"{name}-{gib}-{mode}")
       for mode, mark, names in (("static", STATIC, ("flux", "sdxl", "qwen-image", "wan")),
                                 ("dynamic", DYNAMIC, ("wide flux", "sdxl", "qwen-image", "wan")))
       for name in names for gib in CARDS
       if (name, gib, mode) != ("flux", 24, "static")
       and (name, gib) != ("wan", 6)]  # whose step alone, of 5.9 GiB, does not fit


@pytest.mark.parametrize(("name", "gib"), NORMAL + ALL)
def test_what_is_chosen_stays_on_the_gpu_and_what_is_larger_does_not(name, gib, make_card,
                                                                     monkeypatch):
    card, fitted = check(MODELS[name], gib, make_card, monkeypatch)
    # with whole pages a GPU may have room for more of a narrow model than it would in reality
    is_size = kind_of(fitted.files[0]) == "size"
    has_larger = is_size or (fitted.files[0] and not card.is_dynamic)
    if has_larger and not fitted.copying:
        comfy.model_management.unload_all_models()
        gc.collect()
        check_larger(card, fitted, monkeypatch)


@STATIC
def test_a_dequantized_weight_takes_what_is_counted_for_it(gpus):
    """Until kernels are proven, torch's reference takes BY_TORCH more, of weights of any size."""
    formats = types_for((8192, 4096))
    for name in random.sample(formats, 3):
        rows, columns = random.choice([(8192, 4096), (4096, 8192), (2048, 2048)])
        weight = pack_tensor(torch.randn(64, columns).repeat(rows // 64, 1), FORMATS[name])
        layer = operations_for({"weight": weight}).Linear(columns, rows, bias=False)
        layer.load_state_dict({"weight": weight})
        layer.to(GPU)
        x = torch.randn(4, columns, dtype=torch.bfloat16, device=GPU)
        before = gpus.used()
        gpus.reset()
        y = layer(x)
        counted = for_device.workspace_bytes({"weight": (rows, columns)})
        taken = gpus.peak() - before - y.nbytes
        assert counted <= taken <= counted + BY_TORCH, (name, rows, columns)


@STATIC
def test_a_second_start_packs_nothing(make_card, monkeypatch, tmp_path):
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path))
    make_card(MODELS["shallow flux"], 8)
    caches = [load_diffusion_model(file_of(MODELS["shallow flux"]), pack_to=FIT).get_attachment(
        PACK_STATS_KEY).cache for _ in range(2)]
    assert caches == ["kept", "read"]


@STATIC
def test_the_same_gpu_has_the_same_weights_whatever_is_free(make_card, monkeypatch):
    monkeypatch.setenv(packed_cache.FOLDER, packed_cache.OFF)
    model = MODELS["shallow flux"]
    path, card = file_of(model), make_card(model, 8)
    first = load_diffusion_model(path, pack_to=FIT)
    comfy.model_management.load_models_gpu([first])  # another model
    taken = torch.empty(card.nbytes // 8, dtype=torch.uint8, device=GPU)
    second = load_diffusion_model(path, pack_to=FIT)
    card.counters.set_capacity(card.nbytes * 7.9 / 8 + card.unscaled)  # as drivers report it
    third = load_diffusion_model(path, pack_to=FIT)
    del taken
    assert fit_text(first) and fit_text(first) == fit_text(second) == fit_text(third)
    comfy.model_management.unload_all_models()
    for other in (second, third):
        assert all(map(torch.equal, bytes_of(first), bytes_of(other)))
    card.counters.set_capacity(card.nbytes * 7.7 / 8 + card.unscaled)
    assert fit_text(first) != model_targets(FIT, [path], GPU, ()).text


def bytes_of(patcher) -> list[torch.Tensor]:
    return [part.reshape(-1).view(torch.uint8).cpu() for weight in patcher.model.parameters()
            for part in parts(weight)]
