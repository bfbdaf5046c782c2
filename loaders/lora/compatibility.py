"""Compares a LoRA with a model: which of its layers match, and why the others do not.

The host maps most names and reads the tensors (`comfy.lora`). What it does not read is added here:
other spellings of names, the biases of factors and of slices, and PEFT's DoRA.
"""
import collections
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import torch

from ...ops.patches.adapters import (
    adapter_fields,
    alpha_scale,
    is_plain_lora,
    rank_of,
    shape_mismatch,
    shape_of,
)
from ...ops.patches.as_trained import as_trained, row_dora
from ...ops.patches.patch_trial import trial_error
from ..container.weight_file import safe_repr
from .comfyui_load_lora import load_lora_text
from .family_match import match_family, metadata_hints
from .header_alpha import BESIDE, CONFIG, HeaderAlpha, find_header_alpha, with_alphas
from .lora_file import damaged_layers, weight_shapes
from .model_blocks import MODEL_PREFIX, WRAPPERS, weight_key
from .report import MISSING, LoraReport
from .tensor_names import MAGNITUDE, PRODUCTS, SINGULAR, is_text_name, layer_names
from .training_base import words_of_model
from .weight_change import block_changes, change_type, is_large

TAKEN = "for a weight that another layer of the file changes"
NO_BIAS = "it changes a bias, which this layer of the model does not have"
EMBEDDING = "bundle_emb."  # before the names of embeddings in a LoRA of OneTrainer
SETTING = ".config"  # of an attention, as newer hosts take it from files
XLABS = re.compile(r"\.processor\.(qkv|proj)_lora[12]?\.(up|down)\.weight$")
TEXT_LAYER = re.compile(  # bare name of a layer of CLIP, of T5, or of a language model
    r"encoder_block_\d+_layer_"
    r"|(encoder_)?layers_\d+_(self_attn_([qkvo]|out)_proj|mlp_(gate_proj|up_proj|down_proj|fc\d))$")
PEFT_MAGNITUDE = re.compile(re.escape(MAGNITUDE) + r"(\.default)?(\.weight)?$")


class _ReadTracker(dict[str, torch.Tensor]):
    """The tensors of a file, and the names of those that somebody took."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default=None):
        self.read.add(name)
        return super().get(name, default)


def check_lora(model, clip, state_dict: dict[str, torch.Tensor],
               metadata: dict[str, str] | None = None, measure: bool = True,
               use_header_alpha: bool = True) -> LoraReport:
    """Compares a LoRA with a model and changes neither.

    Args:
        model: patcher of the diffusion model.
        clip: CLIP of the text encoder, or None.
        state_dict, metadata: of the LoRA, from `load_lora_file`.
        measure: whether to estimate the change of each block, which reads some rows of each weight;
            without it that is done for factors of large values.
        use_header_alpha: whether an alpha counts that is not a tensor.
    """
    metadata = metadata or {}
    lora = _rename_tensors(state_dict)
    header_alpha = find_header_alpha(lora, metadata)
    if use_header_alpha:
        lora = with_alphas(lora, header_alpha)
    lora = _with_bias_changes(lora)
    stems = layer_names(lora)
    mismatches = damaged_layers(stems, lora)
    damaged = {stem + end for stem in mismatches for end in stems[stem]}
    sound = _ReadTracker({key: value for key, value in lora.items() if key not in damaged})
    # With names mapped to themselves, all layers are returned, whatever the model.
    layers = _load_layers(sound, {stem: f"{stem}.weight" for stem in stems})
    unread = sorted(sound.keys() - sound.read)
    values = {
        key: layers[key] for stem in stems for key in (f"{stem}.weight", f"{stem}.bias")
        if key in layers
    }
    names = _match_names(model, clip, stems, values)
    twice = _named_twice(stems, names.targets)
    mismatches |= dict.fromkeys(twice, TAKEN)
    loaded = _load_layers(sound, {name: target for name, target in names.targets.items()
                                  if name not in twice})
    reasons = {target: _mismatch(target, value, names.weights) for target, value in loaded.items()}
    patches = {target: value for target, value in loaded.items() if reasons[target] is None}
    unconnected = set() if clip is not None else (
        names.of_text - names.targets.keys() - mismatches.keys())
    mismatches |= {stem: reason for stem in stems
                   if stem not in mismatches and stem not in unconnected
                   and (reason := _layer_mismatch(stem, names, reasons)) is not None}
    has_settings = any(map(is_setting, loaded))
    report = LoraReport(
        patches=patches,
        layers=len(stems) - len(unconnected),
        matched=len(stems) - len(unconnected) - len(mismatches),
        mismatches=mismatches,
        unconnected=len(unconnected),
        unread=[name for name in unread if not (
            name.startswith(EMBEDDING) or (has_settings and name.endswith(SETTING))
            or (clip is None and _is_of_text(name)))],
        embeddings=[name for name in unread if name.startswith(EMBEDDING)],
        change_types=collections.Counter(change_type(value) for value in values.values()),
        ranks=sorted({rank for value in values.values() if shape_of(value)
                      and (rank := rank_of(value)) is not None}),
        family=_family(values, names.of_text, metadata),
        model_family=match_family(weight_shapes({
            key: value for key, value in names.weights.items() if key.startswith(MODEL_PREFIX)})),
        hints=metadata_hints(metadata),
        metadata={key: value for key, value in metadata.items()
                  if key not in (CONFIG, BESIDE)},
        alphas=_alphas(values, header_alpha),
        header_alpha=header_alpha,
        use_header_alpha=use_header_alpha,
        model_words=words_of_model(model),
        text_encoder=names.text_encoder if names.of_text == stems.keys() else "",
    )
    changes = {target: value for target, value in patches.items() if not is_setting(target)}
    if measure:
        report.load_lora = load_lora_text(state_dict, metadata, names.of_host, patches)
    if measure or any(is_large(value, names.weights[weight_key(target)])
                      for target, value in changes.items()):
        report.blocks = block_changes(changes, names.weights)
    return report


def _family(values: Mapping[str, Any], of_text: Container[str], metadata: dict[str, str]):
    shapes = {
        stem: shape for key, value in values.items() if key.endswith(".weight")
        and (stem := key.removesuffix(".weight")) not in of_text
        and (shape := shape_of(value)) is not None
    }
    return match_family(shapes, metadata) if shapes else None


def _alphas(values: Mapping[str, Any],
            header_alpha: HeaderAlpha) -> dict[str, set[tuple[float, float]]]:
    """Returns where it stands -> (alpha, factor on the product) of the layers that have one."""
    alphas = collections.defaultdict(set)
    for name, value in values.items():
        rank = rank_of(value) if shape_of(value) else None
        scale, source = header_alpha.scales.get(name.removesuffix(".weight"), (None, "its tensors"))
        if scale is None and rank is not None:
            alpha = getattr(adapter_fields(value), "alpha", None)
            scale = None if alpha is None else alpha_scale(alpha, rank)
        if scale is not None:
            alphas[source].add((scale * (rank or 1), scale))
    return dict(alphas)


def _rename_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames tensors by the host's own conversions, and those of PEFT, which the host lacks."""
    # By itself the host converts these only if every block is in the file.
    if any(XLABS.search(key) for key in state_dict):
        return comfy.lora_convert.convert_uso_lora(state_dict)
    lora = {
        PEFT_MAGNITUDE.sub(MAGNITUDE, key): value
        for key, value in comfy.lora_convert.convert_lora(state_dict).items()
    }
    for name in [name for name in lora if name.endswith(SINGULAR)]:
        ends = (name.removesuffix(SINGULAR) + down for _, down in PRODUCTS)
        down = next((end for end in ends if end in lora), None)
        if down is not None and lora[name].numel() == len(lora[down]):
            # PEFT (tuners/adalora/layer.py): B (A * E)
            lora[down] = lora[down].float() * lora.pop(name).float().reshape(
                -1, *[1] * (lora[down].ndim - 1))
    return lora


def _with_bias_changes(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the biases of second factors to changes of biases, as far as the host lacks them."""
    for up, down in PRODUCTS:
        bias = up.removesuffix(".weight") + ".bias"
        for stem in [key.removesuffix(bias) for key in lora if key.endswith(bias)]:
            if stem + down in lora and f"{stem}.diff_b" not in lora:
                lora[f"{stem}.diff_b"] = lora.pop(stem + bias) * _scale(lora, stem, down)
    return lora


def _scale(lora: dict[str, torch.Tensor], stem: str, down: str) -> torch.Tensor | float:
    """Returns what alpha multiplies a product with, and the bias of its second factor."""
    alpha, rank = lora.get(f"{stem}.alpha"), lora[stem + down].shape[:1].numel()
    return 1.0 if alpha is None or alpha.numel() != 1 or not rank else alpha.float() / rank


def _load_layers(tensors: dict[str, torch.Tensor], names: dict) -> dict:
    """Returns target -> value of a patch for each layer that can be read.

    Args:
        tensors: of the LoRA.
        names: name of a layer -> target, as the host's `model_lora_keys_unet` returns it.
    """
    values = comfy.lora.load_lora(tensors, names, log_missing=False)
    # what the host makes of a slice's bias
    values = {target: value for target, value in values.items() if target != "().bias"}
    for stem, target in names.items():
        bias = tensors.get(f"{stem}.diff_b")
        if bias is not None:
            values[_bias_target(target)] = ("diff", (bias,))
        value = values.get(target)
        if f"{stem}{MAGNITUDE}" in tensors and is_plain_lora(value):
            values[target] = row_dora(value, tensors[f"{stem}{MAGNITUDE}"])
    return {target: as_trained(value) for target, value in values.items()}


class _Names(NamedTuple):
    """What the layers of a LoRA are for.

    Attributes:
        targets: name of a layer, as the file or the host may have it -> target.
        of_host: those of the targets that have the host's names.
        mismatches: layer -> why it has no target in the model.
        of_text: layers of a text encoder.
        weights: key -> weight of the model and of the text encoder.
        text_encoder: how the names of the text encoder's weights begin.
    """

    targets: dict[str, Any]
    of_host: dict[str, Any]
    mismatches: dict[str, str]
    of_text: set[str]
    weights: dict[str, torch.Tensor]
    text_encoder: str


def _match_names(model, clip, stems: Iterable[str], values: Mapping[str, Any]) -> _Names:
    """Args are as of `check_lora`; values: name of a layer's weight -> value of a patch."""
    of_host = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.named_parameters())
    others, mismatches = _resolve_names(stems, of_host, weights)
    targets = of_host | others
    of_text = {stem for stem in stems if stem not in targets and _is_of_text(stem)}
    text_weights = {}
    if clip is not None:
        text_weights = dict(clip.cond_stage_model.named_parameters())
        text_names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        targets |= _resolve_text_names(
            {stem: values.get(f"{stem}.weight") for stem in of_text - text_names.keys()},
            text_weights) | text_names
        of_host |= text_names
    return _Names(targets, of_host, mismatches, of_text, weights | text_weights,
                  ", ".join(dict.fromkeys(key.split(".")[0] for key in text_weights)))


def _is_of_text(name: str) -> bool:
    return is_text_name(name) or TEXT_LAYER.match(_bare_name(name)) is not None


def _layer_mismatch(stem: str, names: _Names, reasons: Mapping[Any, str | None]) -> str | None:
    """Returns why a layer is not applied, None if it is; reasons: of `_mismatch`, by target."""
    if stem not in names.targets:
        return ("missing in the text encoder" if stem in names.of_text
                else names.mismatches[stem])
    target = names.targets[stem]
    read = [reasons[key] for key in (target, _bias_target(target)) if key in reasons]
    if not read:
        return "written in a way that this ComfyUI does not read"
    return next(filter(None, read), None)


def _resolve_names(stems: Iterable[str], key_map: dict,
                   weights: dict[str, torch.Tensor]) -> tuple[dict, dict[str, str]]:
    """Finds the weights of layers whose names the host does not have in this spelling.

    Args:
        stems: from `layer_names`.
        key_map: the host's names of the model's weights -> targets.
        weights: key -> weight of the model.

    Returns:
        (layer -> target, for a name that means one weight whatever is before it and stands for its
        dots; layer -> why it has no target, for the others).
    """
    targets = collections.defaultdict(set)
    for name, target in key_map.items():
        if weight_key(target) in weights:
            targets[_bare_name(name)].add(target)
    unique = {name: next(iter(group)) for name, group in targets.items() if len(group) == 1}
    taken = {key_map[stem] for stem in stems if stem in key_map}
    found, reasons = {}, {}
    for stem in stems:
        if stem in key_map or is_text_name(stem):
            continue
        target = unique.get(_bare_name(stem))
        if target is None:
            reasons[stem] = _unknown_prefix(stem, unique) or MISSING
        elif target in taken:
            reasons[stem] = TAKEN
        else:
            found[stem] = target
            taken.add(target)
    return found, reasons


def _resolve_text_names(values: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict:
    """Returns layer -> weight of a text encoder, by its name in that encoder and, where several
    encoders have such a weight, its shape.

    Args:
        values: layer -> value of a patch, or None.
        weights: key -> weight of all text encoders.
    """
    targets = collections.defaultdict(list)
    for key in weights:
        name = key.partition(".transformer.")[2] or key.partition(".")[2]
        targets[_bare_name(name.removesuffix(".weight"))].append(key)
    found = {}
    for stem, value in values.items():
        keys = targets[_bare_name(stem)]
        if len(keys) > 1 and value is not None:
            keys = [key for key in keys if shape_mismatch(value, weights[key].shape) is None]
        if len(keys) == 1:
            found[stem] = keys[0]
    return found


def _named_twice(stems: Iterable[str], key_map: dict) -> set[str]:
    """Returns the layers whose target, by another of the host's names, an earlier layer has."""
    taken, twice = set(), set()
    for stem in stems:
        target = key_map.get(stem)
        if target in taken:
            twice.add(stem)
        elif target is not None:
            taken.add(target)
    return twice


def _bare_name(name: str) -> str:
    """Returns the name of a weight without what trainers put before it, dots as underscores."""
    return WRAPPERS.sub("", name).replace(".", "_")


def _unknown_prefix(stem: str, names: dict) -> str | None:
    """Returns why a name that ends like that of a weight in a block has no target, or None."""
    words = stem.replace(".", "_").split("_")
    for index in range(1, len(words)):
        name = "_".join(words[index:])
        if name in names and any(word.isdigit() for word in words[index:]):
            prefix, key = stem[:-len(name)], weight_key(names[name])
            return f"its name is that of {key} after the unknown prefix {safe_repr(prefix)}"
    return None


def is_setting(target) -> bool:
    """Returns whether a patch of the host's changes a setting of a layer, and no weight."""
    return weight_key(target).endswith(SETTING)


def _bias_target(target):
    """Returns the target of the bias beside a weight, or beside a slice of it."""
    bias = weight_key(target).removesuffix(".weight") + ".bias"
    return bias if isinstance(target, str) else (bias, *target[1:])


def _mismatch(target, value, weights: dict[str, torch.Tensor]) -> str | None:
    """Returns why a value cannot be applied to its target; None if it can."""
    parts: tuple = (target,) if isinstance(target, str) else target
    offset, function = (*parts[1:], None, None)[:2]
    key = weight_key(target)
    weight = weights.get(key)
    if weight is None:
        if is_setting(target):
            return None
        return NO_BIAS if key.removesuffix(".bias") + ".weight" in weights else MISSING
    reshape = None if isinstance(value, tuple) else getattr(adapter_fields(value), "reshape", None)
    if reshape is not None:
        reason = shape_mismatch(value, reshape)
    else:
        reason = shape_mismatch(value, weight.shape, offset)
    return reason or trial_error(value, weight.shape, offset, function)
