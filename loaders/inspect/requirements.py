"""Estimates what else a model needs and which graphics cards it fits."""
import functools
from dataclasses import dataclass

from comfy.supported_models_base import BASE

from ..byte_sizes import size_text
from ..devices import CPU
from ..encoders.encoder_sets import set_text
from ..families import model_of
from ..packing.planning.for_device import (
    Choice,
    Memory,
    Sizes,
    Weights,
    choose,
    latents_name_of,
    step_memory,
    workspace_bytes,
)
from ..packing_rules import Shapes

CARDS = (6, 8, 12, 16, 24)  # GiB, which cards' names call GB

# The host's class of latents -> VAE.
VAES = {
    "SD15": "SD 1.5", "SDXL": "SDXL", "SD3": "SD3", "Flux": "Flux (ae.safetensors)",
    "Flux2": "Flux 2", "Wan21": "Wan 2.1", "Wan22": "Wan 2.2", "LTXV": "LTX",
    "LTXAV": "LTX-2's for images and for sound",
    "MiniMaxH3AV": "MiniMax-H3's for images and for sound", "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5", "HunyuanImage21": "HunyuanImage 2.1", "Mochi": "Mochi",
    "Cosmos1CV8x8x8": "Cosmos", "CogVideoX": "CogVideoX", "ACEAudio": "ACE-Step",
    "ACEAudio15": "ACE-Step 1.5", "StableAudio1": "Stable Audio"
}
# Models that draw pixels, without a VAE.
NO_VAE = {"ChromaRadiance", "ZImagePixelSpace", "HiDreamO1Pixel", "PixelDiTPixel"}
VAE_BY_MODEL = {"QwenImage": "Qwen-Image"}


@dataclass(frozen=True)
class Card:
    """How a model fits one size of graphics card.

    Attributes:
        gib: memory of the card.
        missing: bytes of the weights that stay in the computer's memory, 0 if all fit.
        fit: what *fit this GPU* chooses there, "" for no change or if not computed.
    """

    gib: int
    missing: int
    fit: str = ""


def required_models(config: BASE) -> dict[str, str]:
    """Returns the common names of a diffusion model's "text encoder" and "VAE", where known.

    Args:
        config: the host's configuration of the model.
    """
    names = [cls.__name__ for cls in type(config).__mro__]
    models = {}
    if model := model_of(config):
        text = set_text(model.encoder_groups)
        models["text encoder"] = f"{text} (type {model.clip_type})" if model.clip_type else text
    latents = latents_name_of(config)
    vae = VAE_BY_MODEL.get(names[0]) or VAES.get(latents)
    if vae and latents not in NO_VAE:
        models["VAE"] = vae
    return models


def fit_cards(config: BASE, weights: Weights, packed: bool) -> tuple[str, list[Card]]:
    """Estimates how a diffusion model fits each of CARDS in this computer.

    Args:
        config: the host's configuration of the model.
        weights: of the model.
        packed: whether some of them are dequantised.

    Returns:
        The resolution of `step_memory`, and the cards; "" and none if it is not known.
    """
    step = step_memory(config)
    if step is None or not weights.shapes:
        return "", []
    sizes, main_gib, cards = Sizes([weights]), Memory.of(CPU).main_gib, []
    for gib in CARDS:
        memory = Memory(gib, main_gib=main_gib)
        room_for = functools.partial(memory.for_model, step[0])
        choice = choose(sizes, room_for, main=memory.for_copying(config))
        missing = max(0, weights.nbytes - room_for(sizes.workspace if packed else 0))
        cards.append(Card(gib, missing, _fit_text(choice) if choice.target else ""))
    return step[1], cards


def _fit_text(choice: Choice) -> str:
    text = choice.grade_text
    return f"{text}, {size_text(choice.copied)} copied in each step" if choice.copied else text


def fit_encoder_cards(memory_bytes: int, shapes: Shapes) -> list[Card]:
    """Estimates how a text encoder fits each of CARDS; it runs alone, before the model."""
    workspace = workspace_bytes(shapes)
    return [Card(gib, max(0, memory_bytes - Memory(gib).for_encoder(workspace)))
            for gib in CARDS]
