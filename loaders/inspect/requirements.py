"""Estimates what else a model needs and which graphics cards it fits."""
from collections.abc import Iterable
from dataclasses import dataclass

from comfy.supported_models_base import BASE

from ..encoders.encoder_sets import set_text
from ..families import model_of, rules_for
from ..packing.planning.fit import Memory, latents_name_of, step_memory, workspace_bytes
from ..packing.planning.packing_rules import Shapes
from ..packing.planning.plan import plan_for_type

CARDS = (6, 8, 12, 16, 24)  # GiB, which cards' names call GB
TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # the largest first

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
        best: the largest type of the same model that fits whole, "" if none does, None if not
            computed.
    """

    gib: int
    missing: int
    best: str | None


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


def fit_cards(config: BASE, shapes: Shapes, memory_bytes: int,
              packed: bool) -> tuple[str, list[Card]]:
    """Estimates how a diffusion model fits each of CARDS.

    Args:
        config: the host's configuration of the model.
        shapes: as for `rules_for`.
        memory_bytes: bytes of its weights in memory.
        packed: whether some of them are packed.

    Returns:
        The resolution of `step_memory`, and the cards; "" and none if it is not known.
    """
    step = step_memory(config)
    if step is None or not shapes:
        return "", []
    step_bytes, resolution = step
    best = best_types(shapes, CARDS, step_bytes)
    workspace = workspace_bytes(shapes) if packed else 0
    return resolution, [
        Card(gib, max(0, memory_bytes - Memory(gib).for_model(step_bytes, workspace)), best[gib])
        for gib in CARDS
    ]


def best_types(shapes: Shapes, cards: Iterable[int], step_bytes: float) -> dict[int, str]:
    """Returns card -> the largest of TYPES with which a diffusion model fits it whole, "" for none.

    Args:
        shapes: as for `rules_for`.
        cards: their GiB.
        step_bytes: of `step_memory`.
    """
    rules, workspace = rules_for(shapes), workspace_bytes(shapes)
    sizes = {name: plan_for_type(shapes, name, rules).nbytes(shapes) for name in TYPES}
    return {
        gib: next((name for name, nbytes in sizes.items() if nbytes <= Memory(gib).for_model(
            step_bytes, 0 if name == "BF16" else workspace)), "") for gib in cards
    }


def fit_encoder_cards(memory_bytes: int, shapes: Shapes) -> list[Card]:
    """Estimates how a text encoder fits each of CARDS; it runs alone, before the model."""
    workspace = workspace_bytes(shapes)
    return [Card(gib, max(0, memory_bytes - Memory(gib).for_encoder(workspace)), None)
            for gib in CARDS]
