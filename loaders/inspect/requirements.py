"""Estimates what else a model needs and which graphics cards it fits."""
import math
from dataclasses import dataclass
from typing import Any

from ..encoders.encoder_sets import ENCODER_SETS, SINGLE_ENCODERS, TITLES, set_text
from ..packing.planning.packing_rules import Shapes, rules_for
from ..packing.planning.plan import plan_for_type

GIB = 2 ** 30
CARDS = (6, 8, 12, 16, 24)  # GiB, which cards' names call GB
SYSTEM_BYTES = 0.7 * GIB  # estimate for CUDA itself and a desktop
MIN_STEP_BYTES = 0.8 * GIB  # what the host keeps free for a step at least
HOST_RESERVE_BYTES = 0.4 * GIB  # what the host keeps free for other programs
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
    "PixelDiTT2I": ("pixeldit", 1),
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
    "LTXAV": "LTX-2's of pictures and of sound", "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5", "HunyuanImage21": "HunyuanImage 2.1", "Mochi": "Mochi",
    "Cosmos1CV8x8x8": "Cosmos", "CogVideoX": "CogVideoX", "ACEAudio": "ACE-Step",
    "ACEAudio15": "ACE-Step 1.5", "StableAudio1": "Stable Audio"
}
# Models that draw pixels, without a VAE.
NO_VAE = {"ChromaRadiance", "ZImagePixelSpace", "HiDreamO1Pixel", "PixelDiTPixel"}
VAE_BY_MODEL = {"QwenImage": "Qwen-Image"}
# Models of single images whose latents the host stores as video.
IMAGE_MODELS = {"QwenImage", "Anima", "CosmosT2IPredict2", "Krea2", "JoyImage"}


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
    latents = _latents_name(config)
    vae = VAE_BY_MODEL.get(names[0]) or VAES.get(latents)
    if vae and latents not in NO_VAE:
        models["VAE"] = vae
    return models


def _latents_name(config: Any) -> str:
    latents = config.latent_format
    return (latents if isinstance(latents, type) else type(latents)).__name__


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


def step_memory(config: Any) -> tuple[float, str] | None:
    """Estimates the bytes that the host keeps free for a step, in addition to the weights.

    Uses the host's formula with flash attention in 16 bits (`comfy/model_base.py`,
    BaseModel.memory_required).

    Args:
        config: the host's configuration of a diffusion model.

    Returns:
        The bytes and the resolution they are for, or None if the latents are not known.
    """
    latents, names = config.latent_format, {cls.__name__ for cls in type(config).__mro__}
    dimensions, ratio = latents.latent_dimensions, latents.spacial_downscale_ratio
    latents_name = _latents_name(config)
    if "AV" in latents_name or "Audio" in latents_name or dimensions == 1:
        return None
    if dimensions == 2 or names & IMAGE_MODELS:
        area, resolution = (1024 // ratio) ** 2, "1024 × 1024"
    else:
        width, height, frames = (832, 480, 81) if ratio == 8 else (1280, 704, 121)
        latent_frames = (frames - 1) // latents.temporal_downscale_ratio + 1
        area = latent_frames * (width // ratio) * (height // ratio)
        resolution = f"{width} × {height}, {frames} frames"
    step_bytes = area * 2 * 0.01 * config.memory_usage_factor * 2 ** 20
    return max(MIN_STEP_BYTES, step_bytes) + HOST_RESERVE_BYTES, resolution


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
    rules = rules_for(shapes)
    workspace = _workspace_bytes(shapes)
    sizes = {
        name: plan_for_type(shapes, name, rules).nbytes(shapes)
        + (workspace if name != "BF16" else 0)
        for name in TYPES
    }
    other_bytes = step_bytes + SYSTEM_BYTES
    fits = []
    for gib in CARDS:
        best = next((name for name in TYPES if sizes[name] + other_bytes <= gib * GIB), "")
        missing = memory_bytes + (workspace if packed else 0) + other_bytes - gib * GIB
        fits.append(Card(gib, max(0, round(missing)), best))
    return resolution, fits


def fit_encoder_cards(memory_bytes: int, shapes: Shapes) -> list[Card]:
    """Estimates how a text encoder fits each of CARDS; it runs alone, before the model."""
    needed = (
        memory_bytes + _workspace_bytes(shapes) + MIN_STEP_BYTES + HOST_RESERVE_BYTES + SYSTEM_BYTES
    )
    return [Card(gib, max(0, round(needed - gib * GIB)), None) for gib in CARDS]


def _workspace_bytes(shapes: Shapes) -> int:
    """Returns the bytes of the largest matrix dequantised to 16 bits."""
    return 2 * max((math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0)
