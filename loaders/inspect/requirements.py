"""Estimates what else a model needs and which graphics cards it fits."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..encoders.encoder_sets import ENCODER_SETS, SINGLE_ENCODERS, TITLES, set_text
from ..packing.planning.fit import Memory, latents_name_of, step_memory, workspace_bytes
from ..packing.planning.packing_rules import Shapes, rules_for
from ..packing.planning.plan import plan_for_type

CARDS = (6, 8, 12, 16, 24)  # GiB, which cards' names call GB
TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # the largest first

# The host's class of a model -> the `type` of its text encoders in the loaders, and how many files.
# Derived classes that are not listed count as their base.
ENCODER_TYPES = {
    "SD15": ("stable_diffusion", 1), "SDXL": ("sdxl", 2), "SD3": ("sd3", 3), "Flux": ("flux", 2),
    "Flux2": ("flux2", 1), "Chroma": ("chroma", 1), "Lumina2": ("lumina2", 1), "LTXV": ("ltxv", 1),
    "WAN21_T2V": ("wan", 1), "HunyuanVideo": ("hunyuan_video", 2),
    "HunyuanVideo15": ("hunyuan_video_15", 2), "HunyuanImage21": ("hunyuan_image", 2),
    "QwenImage": ("qwen_image", 1), "HiDream": ("hidream", 4), "GenmoMochi": ("mochi", 1),
    "PixArtAlpha": ("pixart", 1), "CosmosT2V": ("cosmos", 1), "CosmosT2IPredict2": ("cosmos", 1),
    "Omnigen2": ("omnigen2", 1), "Kandinsky5": ("kandinsky5", 2),
    "Kandinsky5Image": ("kandinsky5_image", 2), "ACEStep": ("ace", 1), "ACEStep15": ("ace", 2),
    "LongCatImage": ("longcat_image", 1), "CogVideoX_T2V": ("cogvideox", 1), "Lens": ("lens", 1),
    "Ideogram4": ("ideogram4", 1), "Boogu": ("boogu", 1), "Krea2": ("krea2", 1),
    "JoyImage": ("joyimage", 1), "MageFlow": ("mage", 1), "StableAudio": ("stable_audio", 1),
    "PixelDiTT2I": ("pixeldit", 1), "MiniMaxH3": ("minimax", 1),
}
# The host's class -> its encoder, for types that several encoders have.
EXACT_ENCODERS = {
    "SD15": "CLIP-L", "SD20": "CLIP-H", "SDXLRefiner": "CLIP-G", "ZImage": TITLES["QWEN3_4B"],
    "LTXAV": TITLES["GEMMA_3_12B"], "LTXV": TITLES["T5_XXL"], "Lumina2": TITLES["GEMMA_2_2B"],
    "AuraFlow": "T5-XL (Pile)", "Anima": TITLES["QWEN3_06B"]
}
# Encoder of Flux 2 models by the width of their text input, three of the encoder's layers
# concatenated.
FLUX2_ENCODERS = {7680: "Qwen3 4B", 12288: "Qwen3 8B", 15360: TITLES["MISTRAL3_24B"]}
# The host's class of latents -> VAE.
VAES = {
    "SD15": "SD 1.5", "SDXL": "SDXL", "SD3": "SD3", "Flux": "Flux (ae.safetensors)",
    "Flux2": "Flux 2", "Wan21": "Wan 2.1", "Wan22": "Wan 2.2", "LTXV": "LTX",
    "LTXAV": "LTX-2's of pictures and of sound",
    "MiniMaxH3AV": "MiniMax-H3's of pictures and of sound", "HunyuanVideo": "HunyuanVideo",
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


def required_models(config: Any) -> dict[str, str]:
    """Returns the common names of a diffusion model's "text encoder" and "VAE", where known.

    Args:
        config: the host's configuration of the model.
    """
    names = [cls.__name__ for cls in type(config).__mro__]
    models = {}
    encoder = _encoder_names(names)
    if "Flux2" in names:
        encoder = FLUX2_ENCODERS.get(config.unet_config.get("context_in_dim"), encoder)
    clip_type = next((ENCODER_TYPES[name][0] for name in names if name in ENCODER_TYPES), "")
    if encoder:
        models["text encoder"] = f"{encoder} (type {clip_type})" if clip_type else encoder
    latents = latents_name_of(config)
    vae = VAE_BY_MODEL.get(names[0]) or VAES.get(latents)
    if vae and latents not in NO_VAE:
        models["VAE"] = vae
    return models


def _encoder_names(class_names: list[str]) -> str:
    """Returns the text encoders of the first listed class, "" if none is listed."""
    for name in class_names:
        if name in EXACT_ENCODERS:
            return EXACT_ENCODERS[name]
        if name in ENCODER_TYPES:
            clip_type, count = ENCODER_TYPES[name]
            single = [SINGLE_ENCODERS.get(clip_type, set())]
            return set_text(ENCODER_SETS.get(count, {}).get(clip_type) or single)
    return ""


def fit_cards(config: Any, shapes: Shapes, memory_bytes: int,
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
