"""Compares a LoRA with a model: which of its layers match, and why the others do not.

The host maps the names (`comfy.lora`), so this reads exactly what the host can read.
"""
import collections
import re

import comfy.lora
import comfy.lora_convert
import torch

from ...ops.adapters import adapter_fields, rank_of, shape_mismatch, shape_of
from .lora_file import damaged_layers, layer_names, peft_dora_layers, weight_shapes
from .model_blocks import MODEL_PREFIX, weight_key
from .model_families import match_family, metadata_hints
from .report import MISSING, LoraReport
from .training_base import words_of_model
from .weight_change import block_changes, change_type

TEXT_STEM = re.compile(r"^(lora_te|lora_prior_te|text_encoder|te\d?[._]|lycoris_te)")
PEFT = re.compile(r"^base_model\.model\.(?!text_)((?:diffusion_model|transformer|unet)\.)?")
SETTING = ".config"  # of an attention, as newer hosts take it from files
XLABS = re.compile(r"\.processor\.(qkv|proj)_lora[12]?\.(up|down)\.weight$")


def check_lora(model, clip, state_dict: dict[str, torch.Tensor],
               metadata: dict[str, str] | None = None, measure: bool = True) -> LoraReport:
    """Compares a LoRA with a model and changes neither.

    Args:
        model: patcher of the diffusion model.
        clip: CLIP of the text encoder, or None.
        state_dict, metadata: of the LoRA, from `load_lora_file`.
        measure: whether to estimate the change of each block, which reads all factors and some rows
            of each weight.
    """
    metadata = metadata or {}
    lora = _rename_layers(state_dict)
    stems = layer_names(lora)
    known = {stem + end for stem, ends in stems.items() for end in ends}
    unread = sorted(lora.keys() - known)
    mismatches = peft_dora_layers(stems, unread) | damaged_layers(stems, lora)
    damaged = {stem + end for stem in mismatches for end in stems[stem]}
    sound = {key: value for key, value in lora.items() if key not in damaged}
    # With names mapped to themselves, the host's reader returns all layers, whatever the model.
    identity = {stem: f"{stem}.weight" for stem in stems}
    layers = comfy.lora.load_lora(sound, identity, log_missing=False)
    values = {
        key: layers[key] for stem in stems for key in (f"{stem}.weight", f"{stem}.bias")
        if key in layers
    }

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.named_parameters())
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        weights |= dict(clip.cond_stage_model.named_parameters())
    loaded = comfy.lora.load_lora(sound, key_map, log_missing=False)
    reasons = {target: _mismatch(target, value, weights) for target, value in loaded.items()}
    patches = {target: value for target, value in loaded.items() if reasons[target] is None}
    if any(map(is_setting, loaded)):
        unread = [name for name in unread if not name.endswith(SETTING)]

    matched = unconnected = 0
    for stem in stems:
        if stem in mismatches:
            continue
        target = key_map.get(stem)
        if target is None and clip is None and TEXT_STEM.match(stem):
            unconnected += 1
        elif target is None:
            mismatches[stem] = "missing in the text encoder" if TEXT_STEM.match(stem) else MISSING
        else:
            read_keys = [key for key in (target, _bias_key(target)) if key in loaded]
            reason = "written in a way that this ComfyUI does not read"
            if read_keys:
                reason = next(filter(None, (reasons[key] for key in read_keys)), None)
            if reason is None:
                matched += 1
            else:
                mismatches[stem] = reason

    shapes = {
        key.removesuffix(".weight"): shape for key, value in values.items()
        if key.endswith(".weight") and not TEXT_STEM.match(key)
        and (shape := shape_of(value)) is not None
    }
    ranks = {
        rank for value in values.values() if shape_of(value)
        and (rank := rank_of(value)) is not None
    }
    model_weights = {key: value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    report = LoraReport(
        patches=patches,
        layers=len(stems) - unconnected,
        matched=matched,
        mismatches=mismatches,
        unconnected=unconnected,
        unread=unread,
        change_types=collections.Counter(change_type(value) for value in values.values()),
        ranks=sorted(ranks),
        family=match_family(shapes, metadata) if shapes else None,
        model_family=match_family(weight_shapes(model_weights)),
        hints=metadata_hints(metadata),
        metadata=metadata,
        model_words=words_of_model(model),
    )
    if measure:
        report.blocks = block_changes(
            {target: value for target, value in patches.items() if not is_setting(target)}, weights)
    return report


def _rename_layers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames layers by the host's own conversions, and those of PEFT, which the host lacks."""
    state_dict = {_replace_peft_prefix(key): value for key, value in state_dict.items()}
    # By itself the host converts these only if every block is in the file.
    if any(XLABS.search(key) for key in state_dict):
        return comfy.lora_convert.convert_uso_lora(state_dict)
    return comfy.lora_convert.convert_lora(state_dict)


def _replace_peft_prefix(key: str) -> str:
    match = PEFT.match(key)
    if match is None:
        return key
    layer = key[match.end():]
    default = "transformer." if "transformer_blocks." in layer else "diffusion_model."
    return (match[1] or default) + layer


def is_setting(target) -> bool:
    """Returns whether a patch of the host's changes a setting of a layer, and no weight."""
    return weight_key(target).endswith(SETTING)


def _bias_key(target) -> str:
    return weight_key(target).removesuffix(".weight") + ".bias"


def _mismatch(target, value, weights: dict[str, torch.Tensor]) -> str | None:
    """Returns why a value cannot be applied to its target; None if it can."""
    weight = weights.get(weight_key(target))
    if weight is None:
        return None if is_setting(target) else MISSING
    reshape = None if isinstance(value, tuple) else getattr(adapter_fields(value), "reshape", None)
    if reshape is not None:
        return shape_mismatch(value, reshape)
    offset = target[1] if not isinstance(target, str) and len(target) > 1 else None
    return shape_mismatch(value, weight.shape, offset)
