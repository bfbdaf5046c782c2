"""Finds the alpha that a LoRA's writer put next to its tensors: into the header of the file, or
into PEFT's adapter_config.json in its folder.

A product of factors counts alpha / rank times. Of several places the one that says it most exactly
wins: a tensor of the layer, PEFT's config, diffusers' `lora_adapter_metadata`, `<part>.lora_alpha`
with `<part>.r`, and a plain number. `ss_network_alpha` is none of them: kohya's and musubi's
converters multiply alpha into the factors and leave that key in the header.
"""
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .tensor_names import MAGNITUDE, PRODUCTS, is_text_name, layer_names

CONFIG = "adapter_config.json"  # of PEFT, and the key under which `load_lora_file` returns it
CONFIG_BYTES = 1 << 20
ADAPTER = "adapter_model"  # PEFT's name of the file that the config belongs to
DIFFUSERS = "lora_adapter_metadata"
HEADER = "the header's "  # before the names of its keys, for people
PLAIN = ("lora_alpha", "network_alpha", "alpha")
PEFT_KINDS = ("LORA", "LOHA", "LOKR", "ADALORA")
MOST_PARTS = 8  # of a pipeline
NAME_PARTS = 16  # of a layer, that patterns are compared with
FACTORS = (*(down for _, down in PRODUCTS), ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b", ".lokr_w1")
WHOLE_FACTOR = ".lokr_w1"  # of a LoKr without a rank


class HeaderAlpha(NamedTuple):
    """What stands next to the tensors.

    Attributes:
        scales: layer -> (factor on its product, where that stands).
        notes: sentences about what is not taken.
    """
    scales: dict[str, tuple[float, str]]
    notes: list[str]

    @property
    def makes_a_difference(self) -> bool:
        """Whether any layer counts more or less by it."""
        return any(scale != 1 for scale, _ in self.scales.values())


class _Setting(NamedTuple):
    """An alpha of the layers of a part of the model.

    Attributes:
        key: where it stands.
        part: "" for all layers.
        alpha, r: r is None for any rank.
        alphas, ranks: of some layers, see `_patterns`.
        root: whether alpha is divided by the root of r (rsLoRA).
        adaptive: whether training leaves out ranks (AdaLoRA).
    """
    key: str
    part: str
    alpha: float
    r: float | None = None
    alphas: Mapping[str, tuple[int, float]] | None = {}
    ranks: Mapping[str, tuple[int, float]] | None = {}
    root: bool = False
    adaptive: bool = False


def read_config(path: str) -> str | None:
    """Returns the text of the adapter_config.json that may belong to a LoRA file."""
    file = Path(path)
    config = file.with_name(CONFIG)
    try:
        if config.stat().st_size > CONFIG_BYTES or (
                file.stem != ADAPTER and any(file.parent.glob(f"{ADAPTER}.*"))):
            return None
        return config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def find_header_alpha(lora: Mapping[str, torch.Tensor],
                      metadata: Mapping[str, str]) -> HeaderAlpha:
    """Returns the scales of all layers whose alpha is not a tensor.

    Args:
        lora: tensors by name.
        metadata: of the file, and its config.
    """
    layers = layer_names(lora)
    ranks = {stem: _rank(stem, ends, lora) for stem, ends in layers.items()
             if ends.intersection(FACTORS)}
    open_layers = {stem: rank for stem, rank in ranks.items() if ".alpha" not in layers[stem]}
    scales, notes = {}, {}
    for settings in _levels(metadata, ranks, lora):
        for stem, rank in list(open_layers.items()):
            own = [setting for setting in settings if _concerns(setting, stem, rank, settings)]
            found = {_scale(setting, stem, rank) for setting in own}
            if not own:
                continue
            del open_layers[stem]
            keys = " and ".join(dict.fromkeys(setting.key for setting in own))
            if len(found) > 1:
                notes[f"{keys}: not applied, the values differ."] = None
            elif (scale := found.pop()) is None:
                notes[f"{keys}: not applied, it is of another rank than the tensors, or has a"
                      " pattern that is more than a name."] = None
            else:
                scales[stem] = scale, keys
    return HeaderAlpha(scales, list(notes))


def with_alphas(lora: Mapping[str, torch.Tensor], alpha: HeaderAlpha) -> dict[str, torch.Tensor]:
    """Returns the tensors and an alpha of each layer, as the host and other readers take it."""
    lora, layers = dict(lora), layer_names(lora)
    for stem, (scale, _) in alpha.scales.items():
        rank = _rank(stem, layers[stem], lora)
        if rank is None:  # the host has no alpha for it
            name = stem + WHOLE_FACTOR
            lora[name] = lora[name].float() * scale
        else:
            lora[f"{stem}.alpha"] = torch.tensor(scale * rank, dtype=torch.float64)
    return lora


def _rank(stem: str, ends: set[str], lora: Mapping[str, torch.Tensor]) -> int | None:
    """Returns the rank of a layer's factors; None for a LoKr without one."""
    end = next(end for end in FACTORS if end in ends)
    return None if end == WHOLE_FACTOR else lora[stem + end].shape[:1].numel()


def _levels(metadata: Mapping[str, str], ranks: Mapping[str, int | None],
            lora: Mapping[str, torch.Tensor]) -> Iterator[list[_Setting]]:
    """Yields what stands in each place, what counts most first."""
    by_kohya = any(key.startswith("ss_") for key in metadata)
    config = _json(metadata.get(CONFIG))
    if not by_kohya and _fits(config, ranks, lora):
        yield _settings(config, CONFIG)
    yield _settings(_json(metadata.get(DIFFUSERS)), HEADER + DIFFUSERS)
    yield [setting for setting in _settings(metadata) if setting.part or not by_kohya]
    if not by_kohya:
        yield [_Setting(HEADER + key, "", alpha) for key in PLAIN
               if (alpha := _positive(metadata.get(key))) is not None]


def _settings(config: Mapping[str, Any], key: str = "") -> list[_Setting]:
    """Returns the alphas with a rank in PEFT's settings, whose names may begin with a part.

    Args:
        config: the settings.
        key: where they stand; "" for the header itself.
    """
    settings = []
    for name in config:
        part, _, last = name.rpartition(".")
        if last not in ("lora_alpha", "alpha"):
            continue
        prefix = name.removesuffix(last)
        adaptive = config.get(f"{prefix}peft_type") == "ADALORA"
        alpha = _positive(config[name])
        r = _positive(config.get(f"{prefix}{'init_r' if adaptive else 'r'}"))
        if alpha is not None and r is not None:
            settings.append(_Setting(
                key or HEADER + name, part, alpha, r,
                _patterns(config.get(f"{prefix}alpha_pattern")),
                {} if adaptive else _patterns(config.get(f"{prefix}rank_pattern")),
                str(config.get(f"{prefix}use_rslora")).lower() == "true", adaptive))
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


def _concerns(setting: _Setting, stem: str, rank: int | None, settings: list[_Setting]) -> bool:
    """Returns whether a setting is of the part of the model that a layer belongs to."""
    if setting.r is None and rank is None:
        return False
    named = [one.part for one in settings if one.part and stem.startswith(f"{one.part}.")]
    if not setting.part or named:
        return setting.part in ("", *named)
    return is_text_name(f"{setting.part}.") == is_text_name(stem)


def _scale(setting: _Setting, stem: str, rank: int | None) -> float | None:
    """Returns the factor on the product of a layer; None if the setting does not fit it."""
    if setting.ranks is None or setting.alphas is None:
        return None
    r = setting.r or rank
    names = _endings(stem)
    _, r = min((setting.ranks[name] for name in names if name in setting.ranks), default=(0, r))
    _, alpha = min((setting.alphas[name] for name in names if name in setting.alphas),
                   default=(0, setting.alpha))
    if not r or (rank not in (None, r) and not setting.adaptive):
        return None
    return alpha / (math.sqrt(r) if setting.root else r)


def _endings(stem: str) -> list[str]:
    """Returns the ends of a layer's name that begin with one of its parts."""
    parts = stem.rsplit(".", NAME_PARTS)
    return [".".join(parts[index:]) for index in range(len(parts))]


def _fits(config: Mapping[str, Any], ranks: Mapping[str, int | None],
          lora: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether PEFT's config is of these layers: their kind, modules and ranks."""
    kind, targets = config.get("peft_type"), config.get("target_modules")
    has_dora = any(name.endswith(MAGNITUDE) for name in lora)
    if kind not in PEFT_KINDS or not ranks or bool(config.get("use_dora")) != has_dora:
        return False
    settings = _settings(config, CONFIG)
    if isinstance(targets, list) and not all(
            set(_endings(stem)).intersection(map(str, targets)) for stem in ranks):
        return False
    return bool(settings) and all(
        _scale(settings[0], stem, rank) is not None for stem, rank in ranks.items())


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
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < 1e9 else None

