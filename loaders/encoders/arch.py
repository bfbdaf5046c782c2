"""Families of text encoders: what their files call the weights, and what the host calls them.

A family is one class in one file of `archs`. It registers by being defined, and is chosen by the
names and shapes of the
tensors: `general.architecture` is missing or wrong in many files. Files whose weights have the
host's names already need no family.
"""
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

ARCHS: list[type["Arch"]] = []

Weights = dict[str, torch.Tensor]

# The host's names for what it reads from a file's state dict to build a tokenizer: bytes as uint8
# tensors.
SENTENCEPIECE, TEKKEN, TOKENIZER_JSON = TOKENIZER_NAMES = (
    "spiece_model",
    "tekken_model",
    "tokenizer_json",
)

# Where programs put an encoder inside of a larger file; what follows are its own names. ComfyUI,
# Forge, and what stable-diffusion.cpp 2026-08 (src/convert.cpp, src/name_conversion.cpp) writes
# with and without converted names.
PREFIXES = re.compile(
    r"^(text_encoders\.llm|text_encoders\.[^.]+\.(transformer|model)|cond_stage_model\.(1\.)?(transformer|model)"
    r"|conditioner\.embedders\.\d\.(transformer|(open_clip\.)?model)|te\d?(\.\d)?|text_encoder(_\d)?"
    r"|(clip_[lgh]|t5xxl)(\.transformer(?!\.resblocks))?)\.")

# Names of transformers for a language model that is a part of one that sees
# (`…ForConditionalGeneration`; the second of each in newer files) -> the host's. Gemma 3, Mistral
# Small 3.1 and later, Qwen2.5-VL, LLaVA.
INSIDE = (
    (re.compile(r"^(language_model\.model|model\.language_model)\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?vision_tower\.vision_model\."), "vision_model."),
    (re.compile(r"^model\.(multi_modal_projector|visual)\."), r"\1."),
)


class Arch:
    """One family of text encoders.

    names: the file's name -> the host's, both without `.weight` and `.bias`; `{}` is the number of
    a layer. None: the host has no use for it. follows: the converter, with its version, whose names
    and changes these are.
    """

    names: ClassVar[Mapping[str, str | None]]
    follows: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        ARCHS.append(cls)

    @classmethod
    def recognises(cls, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the weights of this family, and of no other."""
        raise NotImplementedError

    @classmethod
    def convert(cls, weights: Weights, metadata: Mapping[str, Any]) -> Weights:
        """The weights under the host's names, as the host's model wants them. Those of an mmproj
        file are among them."""
        return rename_keys(weights, cls.names)

    @classmethod
    def tokenizer(cls, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Weights:
        """What the host builds the tokenizer from, where it has none of its own (see
        SENTENCEPIECE).

        weights: under the file's names. Raises KeyError with the key that the metadata lack.
        """
        return {}

    # whether the family has a vision tower, which comes in an mmproj file
    sees: ClassVar[bool] = False

    @classmethod
    def wants_vision(cls, metadata: Mapping[str, Any]) -> bool:
        """Whether a file with these metadata is of a model that sees, so that its mmproj file is
        looked for."""
        return cls.sees

    @classmethod
    def vision_width(cls, weights: Mapping[str, torch.Tensor],
                     vision: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """(width of the text model, width that the vision tower of an mmproj file gives), under the
        files' names.

        None: those are not the weights of this family's kind of tower.
        """
        return None


def arch_of(weights: Mapping[str, torch.Tensor]) -> type[Arch] | None:
    """The family of these weights, None where no family knows them."""
    return next((arch for arch in ARCHS if arch.recognises(weights)), None)


def strip_prefix(weights: Weights) -> Weights:
    """The weights of one encoder that a program wrote with its place in a larger file before the
    names.

    A file with several encoders stays as it is.
    """
    prefixes = {found[0] for found in map(PREFIXES.match, weights) if found}
    if len(prefixes) != 1:
        return weights
    prefix = prefixes.pop()
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def unwrap_language_model(weights: Weights) -> Weights:
    """The weights of a language model that transformers saved as a part of one that sees, under the
    host's names.

    For those that the host does not know by the names of the whole, as it does Qwen3-VL and
    Qwen3.5.
    """
    changed = {}
    for name, tensor in weights.items():
        pattern, new = next(((pattern, new) for pattern, new in INSIDE if pattern.match(name)),
                            (None, ""))
        changed[name if pattern is None else pattern.sub(new, name)] = tensor
    return changed


def rename_keys(weights: Mapping[str, torch.Tensor], names: Mapping[str, str | None]) -> Weights:
    """The weights under the names of a table as `Arch.names`. Names that are not in it stay."""
    out = {}
    for name, tensor in weights.items():
        stem, dot, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            stem, dot, ending = name, "", ""
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", stem)
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", stem)
        known = next((name for name in (stem, pattern) if name in names), None)
        if known is None or "{" in stem:
            out[name] = tensor
        elif names[known] is not None:
            out[names[known].format(*numbers) + dot + ending] = tensor
    return out
