"""Families of text encoders: map the names and layouts in their files to the host's.

A family is one class in a file of `archs`, and defining it registers it. Names and shapes of the
tensors choose it, since `general.architecture` is missing or wrong in many files. Files that
already have the host's names need no family.
"""
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

ARCHS: list[type["Arch"]] = []

Weights = dict[str, torch.Tensor]

# The host's state dict keys for the bytes (uint8) of a file that it builds a tokenizer from.
SENTENCEPIECE = "spiece_model"
TEKKEN = "tekken_model"
TOKENIZER_JSON = "tokenizer_json"
TOKENIZER_NAMES = (SENTENCEPIECE, TEKKEN, TOKENIZER_JSON)

# Prefixes that programs give the names of an encoder in a larger file: ComfyUI, Forge, and
# stable-diffusion.cpp 2026-08 (src/convert.cpp, src/name_conversion.cpp), with and without
# converted names.
PREFIXES = re.compile(
    r"^(text_encoders\.llm|text_encoders\.[^.]+\.(transformer|model)"
    r"|cond_stage_model\.(1\.)?(transformer|model)"
    r"|conditioner\.embedders\.\d\.(transformer|(open_clip\.)?model)"
    r"|te\d?(\.\d)?|text_encoder(_\d)?"
    r"|(clip_[lgh]|t5xxl)(\.transformer(?!\.resblocks))?)\.")

# Names in transformers of a language model inside a vision-language model
# (`…ForConditionalGeneration`) -> the host's. Where there are two forms, newer files have the
# second. Gemma 3, Mistral Small 3.1 and later, Qwen2.5-VL, LLaVA.
VISION_LANGUAGE_NAMES = (
    (re.compile(r"^(language_model\.model|model\.language_model)\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?vision_tower\.vision_model\."), "vision_model."),
    (re.compile(r"^model\.(multi_modal_projector|visual)\."), r"\1."),
)


class Arch:
    """One family of text encoders.

    Attributes:
        names: the file's name -> the host's, both without `.weight` and `.bias`; `{}` stands for
            the number of a layer, None for a tensor that the host does not use.
        follows: the converter, with its version, that wrote these names and layouts.
        sees: whether the family has a vision tower, which comes in an mmproj file.
    """

    names: ClassVar[Mapping[str, str | None]]
    follows: ClassVar[str]
    sees: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        ARCHS.append(cls)

    @classmethod
    def recognises(cls, weights: Mapping[str, torch.Tensor]) -> bool:
        """Returns whether these weights, under the file's names, are of this family alone."""
        raise NotImplementedError

    @classmethod
    def convert(cls, weights: Weights, metadata: Mapping[str, Any]) -> Weights:
        """Converts the weights to the names and layouts of the host's model.

        Args:
            weights: under the file's names, with those of the mmproj file where there is one.
            metadata: of the file.
        """
        return rename_keys(weights, cls.names)

    @classmethod
    def tokenizer(cls, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Weights:
        """Returns what the host builds the tokenizer from, empty where it brings its own.

        Args:
            weights: under the file's names.
            metadata: of the file.

        Returns:
            One of TOKENIZER_NAMES -> bytes as a uint8 tensor.

        Raises:
            KeyError: with the key that the metadata lack.
            TokenizerError: for metadata that describe no tokenizer.
        """
        return {}

    @classmethod
    def wants_vision(cls, metadata: Mapping[str, Any]) -> bool:
        """Returns whether a file with these metadata needs its mmproj file."""
        return cls.sees

    @classmethod
    def vision_width(cls, weights: Mapping[str, torch.Tensor],
                     vision: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """Returns the widths of the text model and of what the vision tower gives it.

        Args:
            weights: of the text model, under the file's names.
            vision: of the mmproj file, under the file's names.

        Returns:
            None where the mmproj file does not hold this family's tower.
        """
        return None


def arch_of(weights: Mapping[str, torch.Tensor]) -> type[Arch] | None:
    """Returns the family of these weights, None where no family knows them."""
    return next((arch for arch in ARCHS if arch.recognises(weights)), None)


def strip_prefix(weights: Weights) -> Weights:
    """Removes the prefix that a program gave the names of one encoder in a larger file.

    A file with several encoders stays as it is.
    """
    prefixes = {match[0] for match in map(PREFIXES.match, weights) if match}
    if len(prefixes) != 1:
        return weights
    prefix = prefixes.pop()
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def unwrap_language_model(weights: Weights) -> Weights:
    """Renames the language model of a vision-language model of transformers to the host's names.

    For models that the host does not recognise by the names of the whole, as it does Qwen3-VL and
    Qwen3.5.
    """
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in VISION_LANGUAGE_NAMES:
            if pattern.match(name):
                name = pattern.sub(new, name)
                break
        renamed[name] = tensor
    return renamed


def rename_keys(weights: Mapping[str, torch.Tensor], names: Mapping[str, str | None]) -> Weights:
    """Renames weights by a table like `Arch.names`. Names that are not in it stay."""
    renamed = {}
    for name, tensor in weights.items():
        stem, dot, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            stem, dot, ending = name, "", ""
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", stem)
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", stem)
        key = next((key for key in (stem, pattern) if key in names), None)
        if key is None or "{" in stem:
            renamed[name] = tensor
            continue
        new = names[key]
        if new is not None:
            renamed[new.format(*numbers) + dot + ending] = tensor
    return renamed


def unswap_ffn(weights: Weights) -> Weights:
    """Swaps `ffn_up` and `ffn_down` of a vision tower where an old converter swapped their names.

    As llama.cpp 0.5.0 does (tools/mtmd/clip.cpp, is_ffn_swapped).
    """
    down = weights.get("v.blk.0.ffn_down.weight")
    if down is None or down.shape[1] != len(weights["v.blk.0.ln1.weight"]):
        return weights
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return {
        ".".join(swapped.get(part, part) for part in name.split("."))
        if name.startswith("v.") else name: tensor
        for name, tensor in weights.items()
    }
