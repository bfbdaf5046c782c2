"""Which layers of a LoRA fit a model, and why the others do not.

Names are mapped by the host (`comfy.lora`), so what the host can read is what is read here.
"""
import collections
import re

import comfy.lora
import comfy.lora_convert
import torch

from ...ops.adapters import adapter_fields, rank_of, shape_mismatch, shape_of
from .families import hints, recognise
from .lora_file import damaged_layers, layer_names, peft_dora_layers, weight_shapes
from .model_blocks import MODEL_PREFIX, key_of
from .report import MISSING, LoraReport
from .weight_change import block_changes, change_type

TEXT_STEM = re.compile(r"^(lora_te|lora_prior_te|text_encoder|te\d?[._]|lycoris_te)")
PEFT = re.compile(r"^base_model\.model\.(?!text_)((?:diffusion_model|transformer|unet)\.)?")
XLABS = re.compile(r"\.processor\.(qkv|proj)_lora[12]?\.(up|down)\.weight$")


def check_lora(model, clip, state_dict: dict[str, torch.Tensor],
               metadata: dict[str, str] | None = None, measure: bool = True) -> LoraReport:
    """Compare a LoRA, as `load_lora_file` gives it, with a model patcher and a CLIP (or None).
    Changes neither.

    measure: also work out how much each block is changed, which reads all factors and some rows of
    each weight.
    """
    metadata = metadata or {}
    lora = _rename_layers(state_dict)
    stems = layer_names(lora)
    known = {stem + end for stem, ends in stems.items() for end in ends}
    unread = sorted(lora.keys() - known)
    misfits = peft_dora_layers(stems, unread) | damaged_layers(stems, lora)
    damaged = {stem + end for stem in misfits for end in stems[stem]}
    sound = {key: value for key, value in lora.items() if key not in damaged}
    # The host's own reader, with names mapped to themselves: what the file holds, whatever the
    # model.
    own = comfy.lora.load_lora(sound, {stem: f"{stem}.weight" for stem in stems}, log_missing=False)
    values = {
        key: own[key] for stem in stems for key in (f"{stem}.weight", f"{stem}.bias") if key in own
    }

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.named_parameters())
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        weights |= dict(clip.cond_stage_model.named_parameters())
    loaded = comfy.lora.load_lora(sound, key_map, log_missing=False)
    reasons = {target: _mismatch(target, value, weights) for target, value in loaded.items()}
    patches = {target: value for target, value in loaded.items() if reasons[target] is None}

    matched, unconnected = 0, 0
    for stem in stems:
        if stem in misfits:
            continue
        target = key_map.get(stem)
        if target is None and clip is None and TEXT_STEM.match(stem):
            unconnected += 1
        elif target is None:
            misfits[stem] = "missing in the text encoder" if TEXT_STEM.match(stem) else MISSING
        else:
            found = [reasons[key] for key in (target, _bias_of(target)) if key in loaded]
            reason = (
                next(filter(None, found), None)
                if found
                else "written in a way that this ComfyUI does not read"
            )
            if reason is None:
                matched += 1
            else:
                misfits[stem] = reason

    shapes = {
        key.removesuffix(".weight"): shape for key, value in values.items()
        if key.endswith(".weight") and not TEXT_STEM.match(key) and (
            shape := shape_of(value)) is not None
    }
    model_weights = {key: value for key, value in weights.items() if key.startswith(MODEL_PREFIX)}
    report = LoraReport(
        patches=patches, layers=len(stems) - unconnected, matched=matched, misfits=misfits,
        unconnected=unconnected, unread=unread,
        kinds=collections.Counter(change_type(value) for value in values.values()), ranks=sorted({
            rank for value in values.values()
            if shape_of(value) and (rank := rank_of(value)) is not None
        }), family=recognise(shapes, metadata) if shapes else None,
        model_family=recognise(weight_shapes(model_weights)), said=hints(metadata),
        metadata=metadata)
    if measure:
        report.blocks = block_changes(patches, weights)
    return report


def _rename_layers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names the host's readers know, by the host's own conversions, which do not know what PEFT
    saves by itself."""
    state_dict = {_without_peft(key): value for key, value in state_dict.items()}
    # the host converts only those with every block in it
    if any(XLABS.search(key) for key in state_dict):
        return comfy.lora_convert.convert_uso_lora(state_dict)
    return comfy.lora_convert.convert_lora(state_dict)


def _without_peft(key: str) -> str:
    prefix = PEFT.match(key)
    if prefix is None:
        return key
    layer = key[prefix.end():]
    return (
        prefix[1] or ("transformer." if "transformer_blocks." in layer else "diffusion_model.")
    ) + layer


def _bias_of(target) -> str:
    return key_of(target).removesuffix(".weight") + ".bias"


def _mismatch(target, value, weights: dict[str, torch.Tensor]) -> str | None:
    """Why a value cannot be put on its target; None when it can."""
    weight = weights.get(key_of(target))
    if weight is None:
        return MISSING
    offset = target[1] if not isinstance(target, str) and len(target) > 1 else None
    reshape = None if isinstance(value, tuple) else getattr(adapter_fields(value), "reshape", None)
    return (
        shape_mismatch(value, weight.shape, offset)
        if reshape is None
        else shape_mismatch(value, reshape)
    )
