"""What a model needs beside itself, and which memory it fits."""
import math
from dataclasses import dataclass
from typing import Any

from ..encoders.encoder_sets import ENCODER_SETS, SINGLE_ENCODERS, TITLES
from ..packing.planning.packing_rules import Shapes, rules_for
from ..packing.planning.plan import plan_for_type

GIB = 2 ** 30
CARDS = (6, 8, 12, 16, 24)  # GB as cards are named, GiB
SYSTEM = 0.7 * GIB  # CUDA's own memory and a desktop: an estimate
# what the host leaves free for a step at least, and to the system
LEAST, LEFT = 0.8 * GIB, 0.4 * GIB
TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # the largest first

# The host's class of a model -> the type of its text encoders in the loaders, and how many files.
# Classes derived from one that is not named count as it.
ENCODERS = {
    "SD15": ("stable_diffusion", 1), "SDXL": ("sdxl", 2), "SD3": ("sd3", 3), "Flux": ("flux", 2),
    "Flux2": ("flux2", 1), "Chroma": ("chroma", 1), "Lumina2": ("lumina2", 1), "LTXV": ("ltxv", 1),
    "WAN21_T2V": ("wan", 1), "HunyuanVideo": ("hunyuan_video", 2),
    "HunyuanVideo15": ("hunyuan_video_15", 2), "HunyuanImage21": ("hunyuan_image", 2),
    "QwenImage": ("qwen_image", 1), "HiDream": ("hidream", 4), "GenmoMochi": ("mochi", 1),
    "PixArtAlpha": ("pixart", 1), "CosmosT2V": ("cosmos", 1), "CosmosT2IPredict2": ("cosmos", 1),
    "Omnigen2": ("omnigen2", 1), "Kandinsky5": ("kandinsky5", 2),
    "Kandinsky5Image": ("kandinsky5_image", 2), "ACEStep": ("ace", 1), "ACEStep15": ("ace", 2),
    "LongCatImage": ("longcat_image", 1), "CogVideoX_T2V": ("cogvideox", 1), "Lens": ("lens", 1),
    "Ideogram4": ("ideogram4", 1), "Boogu": ("boogu", 1), "Krea2": ("krea2",
                                                                    1), "JoyImage": ("joyimage", 1),
    "MageFlow": ("mage", 1), "StableAudio": ("stable_audio", 1), "PixelDiTT2I": ("pixeldit", 1)
}
# Where the type alone leaves several open: the host's class -> the encoder.
PRECISE = {
    "SD15": "CLIP-L", "SD20": "CLIP-H", "SDXLRefiner": "CLIP-G", "ZImage": TITLES["QWEN3_4B"],
    "LTXAV": TITLES["GEMMA_3_12B"], "LTXV": TITLES["T5_XXL"], "Lumina2": TITLES["GEMMA_2_2B"],
    "AuraFlow": "T5-XL (Pile)", "Anima": TITLES["QWEN3_06B"]
}
# Flux 2 models by the width of the text that they take: three layers of the encoder side by side.
OF_FLUX2 = {7680: "Qwen3 4B", 12288: "Qwen3 8B", 15360: TITLES["MISTRAL3_24B"]}
# The host's class of latents -> their VAE.
VAES = {
    "SD15": "SD 1.5", "SDXL": "SDXL", "SD3": "SD3", "Flux": "Flux (ae.safetensors)",
    "Flux2": "Flux 2", "Wan21": "Wan 2.1", "Wan22": "Wan 2.2", "LTXV": "LTX",
    "LTXAV": "LTX-2's of pictures and of sound", "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5", "HunyuanImage21": "HunyuanImage 2.1", "Mochi": "Mochi",
    "Cosmos1CV8x8x8": "Cosmos", "CogVideoX": "CogVideoX", "ACEAudio": "ACE-Step",
    "ACEAudio15": "ACE-Step 1.5", "StableAudio1": "Stable Audio"
}
# models of pixels
NO_VAE = {"ChromaRadiance", "ZImagePixelSpace", "HiDreamO1Pixel", "PixelDiTPixel"}
OWN_VAE = {"QwenImage": "Qwen-Image"}
# Models that make one picture of latents that the host keeps as video.
STILLS = {"QwenImage", "Anima", "CosmosT2IPredict2", "Krea2", "JoyImage"}


@dataclass(frozen=True)
class Card:
    """gib: of the card. missing: bytes of the weights that stay in the computer's memory, 0 where
    all fit. best: the largest type of the same model that fits whole, "" where none does, None
    where that is not asked.
    """

    gib: int
    missing: int
    best: str | None


def required_models(config: Any) -> dict[str, str]:
    """What goes with a diffusion model: "text encoder" and "VAE" -> what people call them. config:
    the host's of the model."""
    names = [cls.__name__ for cls in type(config).__mro__]
    found = {}
    encoder = next((PRECISE[name] if name in PRECISE else _encoders(*ENCODERS[name])
                    for name in names if name in PRECISE or name in ENCODERS), "")
    if "Flux2" in names:
        encoder = OF_FLUX2.get(config.unet_config.get("context_in_dim"), encoder)
    clip_type = next((ENCODERS[name][0] for name in names if name in ENCODERS), "")
    if encoder:
        found["text encoder"] = f"{encoder} (type {clip_type})" if clip_type else encoder
    latents = _latents(config)
    vae = OWN_VAE.get(names[0]) or VAES.get(latents)
    if vae and latents not in NO_VAE:
        found["VAE"] = vae
    return found


def _latents(config) -> str:
    latents = config.latent_format
    return (latents if isinstance(latents, type) else type(latents)).__name__


def _encoders(clip_type: str, count: int) -> str:
    groups = ENCODER_SETS.get(count, {}).get(clip_type) or [SINGLE_ENCODERS.get(clip_type, set())]
    titles = [" or ".join(sorted(TITLES.get(kind, kind) for kind in group)) for group in groups]
    return " and ".join(filter(None, titles))


def step_memory(config: Any) -> tuple[float, str] | None:
    """(bytes that the host sets aside for a step beside the weights, for which picture). None where
    that is not known.

    The host's own formula with flash attention (`comfy/model_base.py`, BaseModel.memory_required),
    in 16 bits.
    """
    latents, names = config.latent_format, {cls.__name__ for cls in type(config).__mro__}
    dimensions, ratio = latents.latent_dimensions, latents.spacial_downscale_ratio
    if "AV" in _latents(config) or "Audio" in _latents(config) or dimensions == 1:
        return None
    if dimensions == 2 or names & STILLS:
        area, picture = (1024 // ratio) ** 2, "1024 × 1024"
    else:
        width, height, frames = (832, 480, 81) if ratio == 8 else (1280, 704, 121)
        area = (
            ((frames - 1) // latents.temporal_downscale_ratio + 1)
            * (width // ratio)
            * (height // ratio)
        )
        picture = f"{width} × {height}, {frames} frames"
    return max(LEAST, area * 2 * 0.01 * config.memory_usage_factor * 2 ** 20) + LEFT, picture


def fit_cards(config: Any, shapes: Shapes, memory_bytes: int, packed: bool) -> tuple[str, list[Card]]:
    """For which picture, and how a diffusion model that holds `memory_bytes` bytes fits each of CARDS.
    shapes: see `rules_for`."""
    step = step_memory(config)
    if step is None or not shapes:
        return "", []
    family = rules_for(shapes)
    # a weight dequantised
    scratch = 2 * max((math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0)
    sizes = {
        kind: plan_for_type(shapes, kind, family).nbytes(shapes) +
        (scratch if kind != "BF16" else 0) for kind in TYPES
    }
    beside = step[0] + SYSTEM
    found = []
    for gib in CARDS:
        best = next((kind for kind in TYPES if sizes[kind] + beside <= gib * GIB), "")
        missing = memory_bytes + (scratch if packed else 0) + beside - gib * GIB
        found.append(Card(gib, max(0, round(missing)), best))
    return step[1], found


def fit_encoder_cards(memory_bytes: int, shapes: Shapes) -> list[Card]:
    """How a text encoder fits: it runs alone, before the model."""
    scratch = 2 * max((math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0)
    return [
        Card(gib, max(0, round(memory_bytes + scratch + LEAST + LEFT + SYSTEM - gib * GIB)), None)
        for gib in CARDS
    ]
