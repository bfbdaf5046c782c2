"""Finds the alpha that a LoRA's writer put next to its tensors: into the header of the file, else
into PEFT's adapter_config.json in its folder, where no other LoRA is. A product of factors counts
alpha / rank times.

`ss_network_alpha` is none: kohya's and musubi's converters multiply alpha into the factors and
leave that key in the header.
"""
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..paths.file_versions import PEFT_CONFIG
from .tensor_names import MAGNITUDE, PRODUCTS, is_text_name, layer_names

CONFIG = PEFT_CONFIG  # and the key under which `load_lora_file` returns it
CONFIG_BYTES = 1 << 20
BESIDE = f"{CONFIG} of several"  # the key of one next to which are several LoRAs
ADAPTER = "adapter_model"  # PEFT's name of the file that the config belongs to
SUFFIXES = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".bin", ".ckpt")  # of LoRAs
HEADER = "the header's "  # before the names of its keys, for people
DIFFUSERS = "lora_adapter_metadata"
PLAIN = ("lora_alpha", "network_alpha", "alpha")
MOST_PARTS = 8  # of a pipeline
NAME_PARTS = 16  # of a layer, that patterns are compared with
WHOLE_FACTOR = ".lokr_w1"  # of a LoKr without a rank
FACTORS = (*(down for _, down in PRODUCTS), ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b", WHOLE_FACTOR)


class HeaderAlpha(NamedTuple):
    """Layer -> (factor on its product, where that stands), and notes on what does not count."""
    scales: dict[str, tuple[float, str]]
    notes: list[str]


class _Setting(NamedTuple):
    """An alpha of the layers of a part of the model ("": all), for any rank if r is None.

    alphas, ranks: of some layers, see `_patterns`. root: of rsLoRA, which divides by the root of r.
    adaptive: of AdaLoRA, whose training leaves out ranks.
    """
    key: str
    part: str
    alpha: float
    r: float | None = None
    alphas: Mapping[str, tuple[int, float]] | None = {}
    ranks: Mapping[str, tuple[int, float]] | None = {}
    root: bool = False
    adaptive: bool = False


def read_config(path: str) -> dict[str, str]:
    """Returns the text of the adapter_config.json next to a LoRA file, {} where there is none.

    Its key is `CONFIG` if it belongs to the file: PEFT's own, or the only LoRA in the folder. Of
    others it is `BESIDE`.
    """
    file = Path(path)
    config = file.with_name(CONFIG)
    try:
        if config.stat().st_size > CONFIG_BYTES:
            return {}
        loras = [each for each in file.parent.iterdir() if each.suffix.lower() in SUFFIXES]
        is_own = file.stem == ADAPTER or not loras[1:]
        return {CONFIG if is_own else BESIDE: config.read_text(encoding="utf-8")}
    except (OSError, ValueError):
        return {}


def find_header_alpha(lora: Mapping[str, torch.Tensor],
                      metadata: Mapping[str, str]) -> HeaderAlpha:
    """Returns the scales of all layers whose alpha is not a tensor.

    Args:
        lora: tensors by name.
        metadata: of the file, and its config.
    """
    ranks = {stem: _rank(stem, ends, lora) for stem, ends in layer_names(lora).items()
             if ends.intersection(FACTORS)}
    open_layers = [stem for stem in ranks if f"{stem}.alpha" not in lora]
    by_kohya = any(key.startswith("ss_") for key in metadata)
    config, beside = ([] if by_kohya else _of_config(metadata.get(key), key, ranks, lora)
                      for key in (CONFIG, BESIDE))
    scales, notes = {}, {}
    for settings in (*_levels(metadata, by_kohya), config):
        for stem in list(open_layers):
            own = _of_layer(settings, stem)
            if not own:
                continue
            own += _of_layer(config, stem)  # which may say otherwise than the header
            open_layers.remove(stem)
            keys = " and ".join(dict.fromkeys(setting.key for setting in own))
            found = {_scale(setting, stem, ranks[stem]) for setting in own}
            if len(found) > 1:
                notes[f"{keys}: not applied, the values differ."] = None
            elif (scale := found.pop()) is None:
                notes[f"{keys}: not applied, it is of another rank than the tensors, or has a"
                      " pattern that is more than a name."] = None
            else:
                scales[stem] = scale, keys
    if any(_scale(setting, stem, ranks[stem]) != 1 for setting in beside for stem in open_layers):
        notes[f"{CONFIG}: not applied, its folder has other LoRAs. Put the one that it belongs to"
              " into a folder of its own, with it."] = None
    return HeaderAlpha(scales, list(notes))


def _of_layer(settings: Sequence[_Setting], stem: str) -> list[_Setting]:
    return [one for one in settings if one.part and stem.startswith(f"{one.part}.")] or [
        one for one in settings
        if not one.part or is_text_name(f"{one.part}.") == is_text_name(stem)]


def with_alphas(lora: Mapping[str, torch.Tensor], alpha: HeaderAlpha) -> dict[str, torch.Tensor]:
    """Returns the tensors and an alpha of each layer, as the host and other readers take it."""
    lora, layers = dict(lora), layer_names(lora)
    for stem, (scale, _) in alpha.scales.items():
        rank = _rank(stem, layers[stem], lora)
        if rank is None:  # the host has no alpha for it
            lora[stem + WHOLE_FACTOR] = lora[stem + WHOLE_FACTOR].float() * scale
        else:
            lora[f"{stem}.alpha"] = torch.tensor(scale * rank, dtype=torch.float64)
    return lora


def _rank(stem: str, ends: set[str], lora: Mapping[str, torch.Tensor]) -> int | None:
    """Returns the rank of a layer's factors; None for a LoKr without one."""
    end = next(end for end in FACTORS if end in ends)
    return None if end == WHOLE_FACTOR else lora[stem + end].shape[:1].numel()


def _levels(metadata: Mapping[str, str], by_kohya: bool) -> Iterator[list[_Setting]]:
    """Yields what stands in each place of the header, what counts most first."""
    yield _settings(_json(metadata.get(DIFFUSERS)), HEADER + DIFFUSERS)
    yield [setting for setting in _settings(metadata) if setting.part or not by_kohya]
    if not by_kohya:
        yield [_Setting(HEADER + key, "", alpha) for key in PLAIN
               if (alpha := _positive(metadata.get(key))) is not None]


def _settings(config: Mapping[str, Any], key: str = "") -> list[_Setting]:
    """Returns the alphas with a rank in PEFT's settings, whose names may begin with a part.

    key: where they stand; "" for the header itself.
    """
    settings = []
    for name, value in config.items():
        part, dot, last = name.rpartition(".")
        own = {last: config.get(part + dot + last) for last in (
            "r", "init_r", "peft_type", "alpha_pattern", "rank_pattern", "use_rslora")}
        adaptive = own["peft_type"] == "ADALORA"
        alpha, r = _positive(value), _positive(own["init_r" if adaptive else "r"])
        if last in ("lora_alpha", "alpha") and alpha is not None and r is not None:
            settings.append(_Setting(
                key or HEADER + name, part, alpha, r, _patterns(own["alpha_pattern"]),
                {} if adaptive else _patterns(own["rank_pattern"]),
                str(own["use_rslora"]).lower() == "true", adaptive))
    return settings if len(settings) <= MOST_PARTS else []


def _patterns(patterns: Any) -> dict[str, tuple[int, float]] | None:
    """Returns name -> (place, value) of PEFT's patterns; None where one is more than a name, since
    a stranger's regular expression may take forever."""
    table = {}
    for place, (pattern, value) in enumerate(_json(patterns).items()):
        name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
        value = _positive(value)
        if value is None or not re.fullmatch(r"[\w.-]*", name):
            return None
        table.setdefault(name, (place, value))
    return table


def _scale(setting: _Setting, stem: str, rank: int | None) -> float | None:
    """Returns the factor on the product of a layer; None if the setting does not fit it."""
    if setting.ranks is None or setting.alphas is None:
        return None
    names = _endings(stem)
    # PEFT takes the first pattern that fits
    _, r = min((setting.ranks[name] for name in names if name in setting.ranks),
               default=(0, setting.r or rank))
    _, alpha = min((setting.alphas[name] for name in names if name in setting.alphas),
                   default=(0, setting.alpha))
    if not r or (rank not in (None, r) and not setting.adaptive):
        return None
    return alpha / (math.sqrt(r) if setting.root else r)


def _endings(stem: str) -> list[str]:
    """Returns the ends of a layer's name that begin with one of its parts."""
    parts = stem.rsplit(".", NAME_PARTS)
    return [".".join(parts[index:]) for index in range(len(parts))]


def _of_config(text: str | None, key: str, ranks: Mapping[str, int | None],
               lora: Mapping[str, torch.Tensor]) -> list[_Setting]:
    """Returns what PEFT's config says, where it is of these layers: of their kind, modules and
    ranks."""
    config = _json(text)
    settings, targets = _settings(config, key), config.get("target_modules")
    modules = set(map(str, targets)) if isinstance(targets, list) else None
    fits = (
        config.get("peft_type") in ("LORA", "LOHA", "LOKR", "ADALORA")
        and bool(config.get("use_dora")) == any(name.endswith(MAGNITUDE) for name in lora)
        and bool(settings)
        and all(_scale(settings[0], stem, rank) is not None
                and (modules is None or not modules.isdisjoint(_endings(stem)))
                for stem, rank in ranks.items())
    )
    return settings if fits else []


def _json(value: Any) -> dict[str, Any]:
    """Returns an object, or the one that a text describes; {} for anything else."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _positive(value: Any) -> float | None:
    """Returns a positive finite number, which may be written as text."""
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < 1e9 else None
