"""Finds codes that have lost their mark of ComfyUI's, beside weights that have one.

The bytes of a rotated weight look like those of a plain one. So codes with scales and without a
mark are read as the marked ones of their dtype where these can be read in one way only, and are
refused elsewhere. Weights without scales need no mark: 16 bits, plain fp8.
"""
import json
from collections.abc import Mapping
from typing import Any

import torch

from ...ops.formats.base import FormatError
from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import WeightFile, safe_repr
from ..name_lists import join_some
from ..refusals.read_anyway import READ_ANYWAY, reads_anyway
from .base import scaled_layers
from .comfy_quant import pack_parts
from .comfy_quant_banks import is_bank, pack_bank
from .comfy_quant_formats import FP8, GROUP_SCALE, PART_NAMES, SCALE, is_rotated
from .comfy_quant_marks import MARK, OLD_SCALE, mark_of, marked_layers, settings_of_layers
from .comfy_quant_settings import check_settings
from .integers import E8M0
from .parts import PartError, Parts

OLD = OLD_SCALE[1:]
CODES = (torch.int8, torch.uint8, *FP8)
MOST_SETTINGS = 32  # of a dtype that differ in a file, each of which is tried


def restore_marks(file: WeightFile, tensors: dict[str, torch.Tensor]):
    """Marks codes that have lost their mark as the other ones of their dtype are, and notes them.

    Args:
        file: where the tensors come from.
        tensors: name -> tensor as stored; changed in place.

    Raises:
        WeightFileError: such codes may mean several weights.
    """
    marked = marked_layers(file.metadata, tensors)
    if not marked or reads_anyway():
        return
    known = _settings_by_dtype(file, tensors)
    unmarked = []
    for layer in dict.fromkeys(scaled_layers(tensors, (SCALE, OLD, GROUP_SCALE))):
        codes = tensors[f"{layer}.weight"]
        if layer in marked or is_packed(codes) or codes.dtype not in CODES:
            continue
        parts = {name: tensors[f"{layer}.{name}"] for name in PART_NAMES
                 if f"{layer}.{name}" in tensors}
        is_old = OLD in parts and SCALE not in parts
        if is_old:
            parts[SCALE] = parts.pop(OLD)
        fitting = [settings for settings in known.get(codes.dtype, ()) if _fits(settings, parts)]
        is_turned = any(map(is_rotated, fitting))
        if is_turned or (not fitting and _has_several_orders(parts)):
            of_others = ", and theirs are of rotated columns" if is_turned else ""
            raise file.error_at(
                f"{layer}.weight", f"{safe_repr(layer)} has no comfy_quant, as other layers"
                f" have{of_others}", "Download the file again, or get another conversion."
                f" {READ_ANYWAY}")
        if fitting:
            unmarked.append(layer)
            if not is_old:
                tensors[f"{layer}{MARK}"] = mark_of(fitting[0])
    if unmarked:
        file.note(f"{file.path.name}: {join_some(map(safe_repr, unmarked))}"
                  f" {'have' if unmarked[1:] else 'has'} no comfy_quant, as other layers have, and"
                  f" {'are' if unmarked[1:] else 'is'} read as these are.")


def _settings_by_dtype(file: WeightFile, tensors: Mapping[str, torch.Tensor]
                       ) -> dict[torch.dtype, list[dict[str, Any]]]:
    """Returns dtype of codes -> the settings that marked layers with such codes have."""
    known: dict[torch.dtype, dict[str, dict[str, Any]]] = {}
    for layer, settings in settings_of_layers(file.metadata, tensors).items():
        codes = tensors.get(f"{layer}.weight")
        if codes is not None:
            of_dtype = known.setdefault(codes.dtype, {})
            if len(of_dtype) < MOST_SETTINGS:
                of_dtype[json.dumps(settings, sort_keys=True)] = settings
    return {dtype: list(settings.values()) for dtype, settings in known.items()}


def _fits(settings: Mapping[str, Any], parts: Parts) -> bool:
    """Returns whether the parts of a layer can be read by the settings of another."""
    pack = pack_bank if is_bank(settings, parts["weight"]) else pack_parts
    try:
        check_settings(settings, parts)
        return pack(settings, dict(parts)) is not None
    except (PartError, FormatError):
        return False


def _has_several_orders(parts: Parts) -> bool:
    """Returns whether codes or scales of such parts have other orders in other formats."""
    scale = parts.get(SCALE)
    return parts["weight"].dtype == torch.uint8 or GROUP_SCALE in parts or (
        scale is not None and scale.ndim == 2 and scale.dtype in E8M0)
