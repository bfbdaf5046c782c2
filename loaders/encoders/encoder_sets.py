"""Checks that text encoders fit the `type` of a loader and one another.

The host takes any file for any type and fails while it samples. Types that are not listed here are
not checked.
"""
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from ..container.weight_file import WeightFileError
from ..families import MODELS
from .arch import SENTENCEPIECE, TEKKEN, TOKENIZER_JSON
from .archs.t5 import UMT5_TOKENS
from .saved_tokenizer import TOKENIZER_FILES

# The host's name of an encoder (`comfy.sd.TEModel`), or the UMT5 of a T5 -> its usual name.
TITLES = {
    "CLIP_L": "CLIP-L",
    "CLIP_H": "CLIP-H",
    "CLIP_G": "CLIP-G",
    "JINA_CLIP_2": "Jina CLIP v2",
    "T5_XXL": "T5-XXL",
    "T5_XL": "T5-XL (Pile)",
    "T5_BASE": "T5-base",
    "T5_XXL_OLD": "T5-XXL v1.0",
    "UMT5_XXL": "UMT5-XXL",
    "UMT5_BASE": "UMT5-base",
    "BYT5_SMALL_GLYPH": "ByT5-small",
    "T5_GEMMA": "T5-Gemma",
    "LLAMA3_8": "Llama 3 8B",
    "GPT_OSS_20B": "GPT-OSS 20B",
    "MINISTRAL_3_3B": "Ministral 3 3B",
    "MISTRAL3_24B": "Mistral Small 3 24B",
    "MISTRAL3_24B_PRUNED_FLUX2": "Mistral Small 3 24B, cut for Flux 2",
    "GEMMA_2_2B": "Gemma 2 2B",
    "GEMMA_3_4B": "Gemma 3 4B",
    "GEMMA_3_4B_VISION": "Gemma 3 4B with vision",
    "GEMMA_3_12B": "Gemma 3 12B",
    "GEMMA_4_E2B": "Gemma 4 E2B",
    "GEMMA_4_E4B": "Gemma 4 E4B",
    "GEMMA_4_12B": "Gemma 4 12B",
    "GEMMA_4_31B": "Gemma 4 31B",
    "QWEN25_3B": "Qwen2.5 3B",
    "QWEN25_7B": "Qwen2.5 7B",
    "QWEN3_06B": "Qwen3 0.6B",
    "QWEN3_2B": "Qwen3 2B",
    "QWEN3_4B": "Qwen3 4B",
    "QWEN3_8B": "Qwen3 8B",
    "QWEN3VL_4B": "Qwen3-VL 4B",
    "QWEN3VL_8B": "Qwen3-VL 8B",
    "QWEN3VL_32B": "Qwen3-VL 32B",
    "QWEN35_08B": "Qwen3.5 0.8B",
    "QWEN35_2B": "Qwen3.5 2B",
    "QWEN35_4B": "Qwen3.5 4B",
    "QWEN35_9B": "Qwen3.5 9B",
    "QWEN35_27B": "Qwen3.5 27B",
}
# The type decides which model the host builds for these; for all others the weights do.
BUILT_BY_TYPE = {
    "CLIP_L", "CLIP_G", "T5_XXL", "UMT5_XXL", "T5_BASE", "UMT5_BASE", "BYT5_SMALL_GLYPH"
}
CLIP_OR_T5 = {
    family for family in TITLES if family.startswith(("CLIP", "JINA", "T5", "UMT5", "BYT5"))
}

# Encoders whose tokenizer the host reads from their file -> its key in the state dict.
TOKENIZER_OF = {
    **dict.fromkeys(("GEMMA_2_2B", "GEMMA_3_4B", "GEMMA_3_4B_VISION", "GEMMA_3_12B", "UMT5_XXL",
                     "UMT5_BASE", "T5_GEMMA", "JINA_CLIP_2"), SENTENCEPIECE),
    **dict.fromkeys(("MINISTRAL_3_3B", "MISTRAL3_24B", "MISTRAL3_24B_PRUNED_FLUX2"), TEKKEN),
    **dict.fromkeys(("GPT_OSS_20B", "GEMMA_4_E2B", "GEMMA_4_E4B", "GEMMA_4_12B", "GEMMA_4_31B"),
                    TOKENIZER_JSON)
}

# published files that hold theirs
WITH_TOKENIZER = {"UMT5_XXL": ", such as umt5_xxl_fp16.safetensors or"
                              " umt5_xxl_fp8_e4m3fn_scaled.safetensors of Comfy-Org, or a GGUF"}

ANY = "stable_diffusion"  # type for encoders that the host builds by their weights


def _sets_of_types() -> tuple[dict[str, set[str]], dict[int, dict[str, list[set[str]]]]]:
    """Returns what the models of each type take.

    Returns:
        (type -> the encoders that it takes one at a time, number of files -> type -> the encoders
        that go together, one of each group).
    """
    single, sets = {}, {2: {}, 3: {}, 4: {}}
    for model in MODELS:
        groups = model.encoder_groups
        if not model.clip_type or not groups:
            continue
        alone = set(model.also)
        if len(groups) > 1:
            sets[len(groups)][model.clip_type] = groups
        if len(groups) != 2:
            alone |= set().union(*groups)
        if len(groups) > 2:
            sets[2][model.clip_type] = [alone] * 2
        if alone:
            single.setdefault(model.clip_type, set()).update(alone)
    return single, sets


SINGLE_ENCODERS, ENCODER_SETS = _sets_of_types()

# Types whose models take text alone. For Gemma 3 4B with a vision tower the host would build a
# model that only writes text.
TEXT_ALONE = {"lumina2", "newbie"}


def encoder_family(te_model: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Returns the key of TITLES for an encoder.

    Args:
        te_model: what the host detects (a name of `comfy.sd.TEModel`).
        weights: under the host's names.
    """
    tokens = weights["shared.weight"].shape[0] if "shared.weight" in weights else 0
    if te_model in ("T5_XXL", "T5_BASE") and tokens > UMT5_TOKENS:
        return f"UM{te_model}"
    return te_model


def reject_same_encoders(names: Sequence[str], families: Sequence[str | None]):
    """Raises WeightFileError where two files hold the same encoder.

    names, families: as for `reject_wrong_encoders`.
    """
    counts = Counter(filter(None, families))
    twice = next((family for family, count in counts.items() if count > 1), None)
    if twice is not None:
        same = " and ".join(name for name, family in zip(names, families) if family == twice)
        raise WeightFileError(
            f"{same} are both {TITLES.get(twice, twice)}, expected different text encoders. Pick"
            " another file in one of the inputs.")


def reject_wrong_encoders(names: Sequence[str], families: Sequence[str | None],
                          clip_type: str) -> str:
    """Checks that the encoders are those that a type needs.

    Args:
        names: of the files.
        families: of the files, keys of TITLES; None for a file without an encoder, which some types
            take along with one.
        clip_type: the `type` of the loader.

    Returns:
        A warning, or "".

    Raises:
        WeightFileError: for files that the type cannot work with.
    """
    reject_same_encoders(names, families)
    if clip_type == ANY:
        return ""
    if len(families) == 1:
        return _reject_wrong_encoder(names[0], families[0], clip_type)
    groups = ENCODER_SETS.get(len(families), {}).get(clip_type)
    if groups is None:
        return ""
    for name, family in zip(names, families):
        if not any(family in group for group in groups):
            raise WeightFileError(
                f"{name} is {_title(family)}; {clip_type} wants {set_text(groups)}."
                f" {_advice(family)}")
    return ""


def reject_missing_tokenizers(names: Sequence[str], families: Sequence[str | None],
                              weights: Sequence[Mapping[str, torch.Tensor]]):
    """Raises WeightFileError for an encoder whose tokenizer is in none of the files.

    Args:
        names, families: as for `reject_wrong_encoders`.
        weights: of the files, under the host's names.
    """
    for name, family in zip(names, families):
        key = TOKENIZER_OF.get(family) if family else None
        if family and key is not None and not any(key in part for part in weights):
            raise WeightFileError(
                f"{name} is {_title(family)} without its tokenizer, and ComfyUI does not have it."
                f" For a folder: put the {' or '.join(TOKENIZER_FILES[key])} that was"
                f" published with the encoder into it. For a file: get one that holds {key}"
                f"{WITH_TOKENIZER.get(family, '')}.")


def _reject_wrong_encoder(name: str, family: str | None, clip_type: str) -> str:
    """Does the work of `reject_wrong_encoders` for a single file."""
    expected = SINGLE_ENCODERS.get(clip_type)
    if expected is None or family in expected:
        return ""
    titles = " or ".join(sorted(map(_title, expected)))
    problem = f"{name} is {_title(family)}; {clip_type} wants {titles}"
    if family not in BUILT_BY_TYPE and (family is not None or not expected <= CLIP_OR_T5):
        return f"{problem}."
    raise WeightFileError(f"{problem}. {_advice(family)}")


def _title(family: str | None) -> str:
    return "not a text encoder" if family is None else TITLES.get(family, family)


def set_text(groups: list[set[str]]) -> str:
    """Returns the titles of encoders that go together, one of each group."""
    titles = [" or ".join(sorted(map(_title, group))) for group in groups]
    return titles[0] if len(set(titles)) == 1 else " and ".join(titles)


def _advice(family: str | None) -> str:
    types = [clip_type for clip_type, families in SINGLE_ENCODERS.items() if family in families]
    types += [
        f"{clip_type} ({count} files)" for count, sets in ENCODER_SETS.items()
        for clip_type, groups in sets.items() if any(family in group for group in groups)
    ]
    if not types:
        return "Pick another file or type."
    return f"Pick another file, or a type it is for: {', '.join(types)}."
