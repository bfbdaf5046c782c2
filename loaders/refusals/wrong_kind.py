"""Says of which kind a file is by the names of its tensors, where another kind was expected."""
import re
from collections.abc import Iterable

import comfy.sd

from ..container.weight_file import WeightFile, WeightFileError

# Names of tensors that no diffusion model has, what such a file is, and where to load it.
NOT_DIFFUSION = (
    (
        r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|^text_model\.embeddings\."
        r"|^(model|encoder)\.embed_tokens\.",
        "a text encoder",
        "Pick it in Load Text Encoder (GGUF, Featherweight).",
    ),
    (
        r"^(v\.blk|mm)\.",
        "the vision part (mmproj) of a text encoder",
        "Pick it in Load Text Encoder (GGUF, Featherweight), under mmproj.",
    ),
    (
        r"\.lora_(a|b|A|B|up|down)(\.weight)?$",
        "a LoRA",
        "Load a model here and put the LoRA in a LoRA loader after it.",
    ),
)


# Of side models: a pattern of tensor names that no other model has, the type and the family.
MODEL_PATCH, CLIP_VISION, CONTROLNET = "model patch", "CLIP vision model", "ControlNet"
SIDE_MODELS = (
    (r"^control_all_x_embedder\.", MODEL_PATCH, "Z-Image Fun ControlNet"),
    (r"^controlnet_blocks\.\d+\.y_rms\.", MODEL_PATCH, "Qwen-Image DiffSynth ControlNet"),
    (r"^controlnet_patch_embedding\.", MODEL_PATCH, "Uni3C ControlNet for Wan"),
    (r"^audio_proj\.proj1\.", MODEL_PATCH, "MultiTalk or InfiniteTalk for Wan"),
    (r"^feature_embedder\.", MODEL_PATCH, "USO style projector for Flux"),
    (r"^lllite_", MODEL_PATCH, "LLLite for Anima"),
    (r"(^|\.)project_modules\.", MODEL_PATCH, "SUPIR for SDXL"),
    (r"^vision_model\.encoder\.layers\.47\.|^visual\.transformer\.resblocks\.47\.", CLIP_VISION,
     "CLIP bigG"),
    (r"^vision_model\.encoder\.layers\.30\.|^visual\.transformer\.resblocks\.30\.", CLIP_VISION,
     "CLIP H"),
    (r"^visual\.transformer\.30\.", CLIP_VISION, "CLIP H, under Wan's names"),
    (r"^vision_model\.encoder\.layers\.26\.", CLIP_VISION, "SigLIP"),
    (r"^vision_model\.encoder\.layers\.22\.|^visual\.transformer\.resblocks\.22\.", CLIP_VISION,
     "CLIP L"),
    (r"^encoder\.layer\.\d+\.layer_scale\d\.", CLIP_VISION, "DINOv2"),
    (r"^layer\.\d+\.mlp\.(gate|up)_proj\.", CLIP_VISION, "DINOv3"),
    (r"^(control_model\.|controlnet_|input_hint_block\.|zero_convs\.)", CONTROLNET, ""),
)
SIDE_LOADERS = {MODEL_PATCH: "Load Model Patch (Featherweight)",
                CLIP_VISION: "Load CLIP Vision (Featherweight)",
                CONTROLNET: "Load ControlNet (Featherweight)"}


def describe_other_kind(names: Iterable[str], kind: str) -> str | None:
    """Returns what a file is by the names of its tensors: "a LoRA (it has 'x.lora_A')".

    Args:
        names: of the tensors.
        kind: that was expected.

    Returns:
        Another kind, of `NOT_DIFFUSION`, `SIDE_MODELS` or `find_other_part`; None if the names are
        those of none.
    """
    names = list(names)
    side_model = first_match(names, SIDE_MODELS)
    matches = (first_match(names, NOT_DIFFUSION),
               side_model and (f"a {side_model[0]}", *side_model[1:]), find_other_part(names))
    return next((f"{match[0]} (it has {match[2]!r})" for match in matches
                 if match and not match[0].startswith(f"a {kind}")), None)


def first_match(names: Iterable[str],
                 table: Iterable[tuple[str, str, str]]) -> tuple[str, str, str] | None:
    """Returns the two texts of the first row whose pattern is in one of some names, and that name.

    Args:
        names: of tensors.
        table: rows of a pattern and two texts.
    """
    names = list(names)
    for pattern, first, second in table:
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            return first, second, name
    return None


def reject_non_diffusion(file: WeightFile):
    """Raises WeightFileError for a text encoder, mmproj or LoRA picked as a diffusion model."""
    # Nunchaku's first files call the low rank beside a quantised weight a LoRA
    names = [name for name in file.entries if ".lora_" not in name
             or f"{name.rpartition('.')[0]}.qweight" not in file.entries]
    if match := first_match(names, NOT_DIFFUSION):
        raise _not_diffusion(file, *match)


def _not_diffusion(file: WeightFile, title: str, advice: str, name: str) -> WeightFileError:
    return WeightFileError(
        f"{file.name} is {title} (it has {name!r}), expected a diffusion model. {advice}")


VAE_PREFIXES = ("first_stage_model.", "vae.")  # of a checkpoint's names
VAE = (
    rf"^({'|'.join(map(re.escape, VAE_PREFIXES))})?("
    r"(taesd_)?(decoder|encoder)\.(conv_?in|conv1|mid|down|up|\d+|layers\.\d+\.block)\b|post_quant_conv\.)"
)
# what the host knows VAEs by: all names in its code
VAE_NAMES = frozenset(name for name in comfy.sd.VAE.__init__.__code__.co_consts
                      if isinstance(name, str) and "." in name)
CONNECTORS = re.compile(r"(^|\.)((video|audio)_embeddings_connector|text_embedding_projection)\.")


def find_other_part(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Returns what a file is in which the host detects no diffusion model, what to do with it, and
    the name that shows it; None for other names."""
    names = list(names)
    if names and all(map(CONNECTORS.search, names)):
        return ("a module with LTX-2's connectors", "Pick it in Load Diffusion Model"
                " (GGUF, Featherweight), at module, or with the text encoder.", names[0])
    vae = next((name for name in names if re.search(VAE, name) or any(
        name.removeprefix(prefix) in VAE_NAMES for prefix in VAE_PREFIXES)), None)
    if vae is None or any(name.startswith("model.diffusion_model.") for name in names):
        return None
    return "a VAE", "Load it with Load VAE.", vae


def reject_side_model(file: WeightFile):
    """Raises WeightFileError for one of `SIDE_MODELS`, or for a part of a model, such as a VAE,
    picked as a diffusion model."""
    if match := first_match(file.entries, SIDE_MODELS):
        kind, _, name = match
        raise _not_diffusion(file, f"a {kind}", f"Pick it in {SIDE_LOADERS[kind]}.", name)
    if match := find_other_part(file.entries):
        raise _not_diffusion(file, *match)
