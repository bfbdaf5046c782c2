"""Which text encoders belong together: what the `type` of a loader wants, and what is said when the
files are others.

The host takes any file for any type, and fails while it samples. Types that are not listed here are
left to the host.
"""
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from ..files.container import WeightFileError
from .arch import SENTENCEPIECE, TEKKEN, TOKENIZER_JSON
from .archs.t5 import UMT5_TOKENS
from .saved_tokenizer import TOKENIZER_FILES

# The host's name of an encoder (`comfy.sd.TEModel`), with UMT5 told from T5 -> what people call it.
TITLES = {
    "CLIP_L": "CLIP-L", "CLIP_H": "CLIP-H", "CLIP_G": "CLIP-G", "JINA_CLIP_2": "Jina CLIP v2",
    "T5_XXL": "T5-XXL", "T5_XL": "T5-XL", "T5_BASE": "T5-base", "T5_XXL_OLD": "T5-XXL v1.0",
    "UMT5_XXL": "UMT5-XXL", "UMT5_BASE": "UMT5-base", "BYT5_SMALL_GLYPH": "ByT5-small",
    "T5_GEMMA": "T5-Gemma", "LLAMA3_8": "Llama 3 8B", "GPT_OSS_20B": "GPT-OSS 20B",
    "MINISTRAL_3_3B": "Ministral 3 3B", "MISTRAL3_24B": "Mistral Small 3 24B",
    "MISTRAL3_24B_PRUNED_FLUX2": "Mistral Small 3 24B, cut for Flux 2", "GEMMA_2_2B": "Gemma 2 2B",
    "GEMMA_3_4B": "Gemma 3 4B", "GEMMA_3_4B_VISION": "Gemma 3 4B with vision",
    "GEMMA_3_12B": "Gemma 3 12B", "GEMMA_4_E2B": "Gemma 4 E2B", "GEMMA_4_E4B": "Gemma 4 E4B",
    "GEMMA_4_12B": "Gemma 4 12B", "GEMMA_4_31B": "Gemma 4 31B", "QWEN25_3B": "Qwen2.5 3B",
    "QWEN25_7B": "Qwen2.5 7B", "QWEN3_06B": "Qwen3 0.6B", "QWEN3_2B": "Qwen3 2B",
    "QWEN3_4B": "Qwen3 4B", "QWEN3_8B": "Qwen3 8B", "QWEN3VL_4B": "Qwen3-VL 4B",
    "QWEN3VL_8B": "Qwen3-VL 8B", "QWEN3VL_32B": "Qwen3-VL 32B", "QWEN35_08B": "Qwen3.5 0.8B",
    "QWEN35_2B": "Qwen3.5 2B", "QWEN35_4B": "Qwen3.5 4B", "QWEN35_9B": "Qwen3.5 9B",
    "QWEN35_27B": "Qwen3.5 27B"
}
# What the host makes of these follows from the type; of all others from what they are, whatever the
# type.
OF_A_TYPE = {"CLIP_L", "CLIP_G", "T5_XXL", "UMT5_XXL", "T5_BASE", "UMT5_BASE", "BYT5_SMALL_GLYPH"}
CLIP_OR_T5 = {kind for kind in TITLES if kind.startswith(("CLIP", "JINA", "T5", "UMT5", "BYT5"))}

# Encoders whose tokenizer the host has from their file alone -> what of the file that is.
TOKENIZER_OF = {
    **dict.fromkeys(
        (
            "GEMMA_2_2B",
            "GEMMA_3_4B",
            "GEMMA_3_4B_VISION",
            "GEMMA_3_12B",
            "UMT5_XXL",
            "UMT5_BASE",
            "T5_GEMMA",
            "JINA_CLIP_2",
        ),
        SENTENCEPIECE,
    ),
    **dict.fromkeys(("MINISTRAL_3_3B", "MISTRAL3_24B", "MISTRAL3_24B_PRUNED_FLUX2"), TEKKEN),
    **dict.fromkeys(
        ("GPT_OSS_20B", "GEMMA_4_E2B", "GEMMA_4_E4B", "GEMMA_4_12B", "GEMMA_4_31B"), TOKENIZER_JSON
    ),
}

# type -> the encoders that models of this type take, one at a time.
SINGLE_ENCODERS = {
    "stable_cascade": {"CLIP_G"}, "sd3": {"CLIP_L", "CLIP_G",
                                          "T5_XXL"}, "stable_audio": {"T5_BASE", "T5_GEMMA"},
    "mochi": {"T5_XXL"}, "ltxv": {"T5_XXL",
                                  "GEMMA_3_12B"}, "pixart": {"T5_XXL"}, "cosmos": {"T5_XXL_OLD"},
    "lumina2": {"GEMMA_2_2B", "GEMMA_3_4B", "GEMMA_3_4B_VISION", "QWEN3_4B"}, "wan": {"UMT5_XXL"},
    "hidream": {"CLIP_L", "CLIP_G", "T5_XXL",
                "LLAMA3_8"}, "chroma": {"T5_XXL"}, "ace": {"UMT5_BASE"}, "omnigen2": {"QWEN25_3B"},
    "qwen_image": {"QWEN25_7B"}, "hunyuan_image": {"QWEN25_7B"}, "flux2": {
        "MISTRAL3_24B", "MISTRAL3_24B_PRUNED_FLUX2", "QWEN3_4B", "QWEN3_8B", "QWEN3VL_4B",
        "QWEN3VL_8B"
    }, "ovis": {"QWEN3_2B"}, "longcat_image": {"QWEN25_7B"}, "cogvideox": {"T5_XXL"},
    "lens": {"GPT_OSS_20B"}, "pixeldit": {"GEMMA_2_2B"}, "ideogram4": {"QWEN3_8B", "QWEN3VL_8B"},
    "boogu": {"QWEN3VL_8B"}, "krea2": {"QWEN3VL_4B"}, "joyimage": {"QWEN3VL_8B"},
    "mage": {"QWEN3VL_4B"}, "minimax": {"QWEN3VL_32B"}
}
# type -> the encoders that go together: one of each group.
ENCODER_SETS = {
    2: {
        "sdxl": [{"CLIP_L"}, {"CLIP_G"}], "flux": [{"CLIP_L"}, {"T5_XXL"}],
        "hunyuan_video": [{"CLIP_L"}, {"LLAMA3_8"}], "hunyuan_image": [{"QWEN25_7B"},
                                                                       {"BYT5_SMALL_GLYPH"}],
        "hunyuan_video_15": [{"QWEN25_7B"}, {"BYT5_SMALL_GLYPH"}], "kandinsky5": [{"QWEN25_7B"},
                                                                                  {"CLIP_L"}],
        "kandinsky5_image": [{"QWEN25_7B"},
                             {"CLIP_L"}], "newbie": [{"GEMMA_3_4B", "GEMMA_3_4B_VISION"},
                                                     {"JINA_CLIP_2"}],
        "ace": [{"QWEN3_06B"}, {"QWEN3_2B",
                                "QWEN3_4B"}], "sd3": [{"CLIP_L", "CLIP_G", "T5_XXL"}] * 2,
        "hidream": [{"CLIP_L", "CLIP_G", "T5_XXL", "LLAMA3_8"}] * 2
    }, 3: {"sd3": [{"CLIP_L"}, {"CLIP_G"}, {"T5_XXL"}]},
    4: {"hidream": [{"CLIP_L"}, {"CLIP_G"}, {"T5_XXL"}, {"LLAMA3_8"}]}
}

# Types whose models take text alone. With the tower of Gemma 3 4B in its files the host builds a
# model that only writes text.
TEXT_ALONE = {"lumina2", "newbie"}


def encoder_family(te_model: str, weights: Mapping[str, torch.Tensor]) -> str:
    """A key of TITLES. te_model: what the host takes the weights for (a name of
    `comfy.sd.TEModel`)."""
    tokens = weights["shared.weight"].shape[0] if "shared.weight" in weights else 0
    return (
        f"UM{te_model}" if te_model in ("T5_XXL", "T5_BASE") and tokens > UMT5_TOKENS else te_model
    )


def reject_wrong_encoders(names: Sequence[str], kinds: Sequence[str | None], clip_type: str) -> str:
    """Raise WeightFileError for files that the type cannot work with; return a warning, or "".

    names: of the files. kinds: keys of TITLES; None for a file that holds no encoder, which some
    types take beside one.
    """
    twice = next((kind for kind, count in Counter(filter(None, kinds)).items() if count > 1), None)
    if twice is not None:
        same = " and ".join(name for name, kind in zip(names, kinds) if kind == twice)
        raise WeightFileError(
            f"{same} are both {TITLES.get(twice, twice)}, expected different text encoders. Pick"
            " another file in one of the inputs.")
    if len(kinds) == 1:
        return _single(names[0], kinds[0], clip_type)
    groups = ENCODER_SETS.get(len(kinds), {}).get(clip_type)
    if groups is None:
        return ""
    for name, kind in zip(names, kinds):
        if not any(kind in group for group in groups):
            raise WeightFileError(
                f"{name} is {_title(kind)}; {clip_type} wants {_wanted(groups)}. {_advice(kind)}")
    return ""


def reject_missing_tokenizers(names: Sequence[str], kinds: Sequence[str | None],
                              weights: Sequence[Mapping[str, torch.Tensor]]):
    """Raise WeightFileError for an encoder whose tokenizer is in none of the files. names, kinds:
    as in `reject_wrong_encoders`.
    """
    for name, kind in zip(names, kinds):
        wanted = TOKENIZER_OF.get(kind)
        if wanted is not None and not any(wanted in part for part in weights):
            raise WeightFileError(
                f"{name} is {_title(kind)} without its tokenizer, of which ComfyUI has none of its"
                f" own. In a folder put the {' or '.join(TOKENIZER_FILES[wanted])} that was"
                f" published with it; in the place of a file get one that holds {wanted}.")


def _single(name: str, kind: str | None, clip_type: str) -> str:
    wanted = SINGLE_ENCODERS.get(clip_type)
    if wanted is None or kind in wanted:
        return ""
    problem = (
        f"{name} is {_title(kind)}; {clip_type} wants {' or '.join(sorted(map(_title, wanted)))}"
    )
    if kind not in OF_A_TYPE and (kind is not None or not wanted <= CLIP_OR_T5):
        return f"{problem}."
    raise WeightFileError(f"{problem}. {_advice(kind)}")


def _title(kind: str | None) -> str:
    return "no text encoder" if kind is None else TITLES.get(kind, kind)


def _wanted(groups: list[set[str]]) -> str:
    titles = [" or ".join(sorted(map(_title, group))) for group in groups]
    return titles[0] if len(set(titles)) == 1 else " and ".join(titles)


def _advice(kind: str | None) -> str:
    homes = [clip_type for clip_type, kinds in SINGLE_ENCODERS.items() if kind in kinds]
    homes += [
        f"{clip_type} ({count} files)" for count, sets in ENCODER_SETS.items()
        for clip_type, groups in sets.items() if any(kind in group for group in groups)
    ]
    return (
        f"Pick another file, or a type it is for: {', '.join(homes)}."
        if homes
        else "Pick another file or type."
    )
