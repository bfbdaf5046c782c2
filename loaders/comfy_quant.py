"""Weights in the host's own quantised formats (fp8 with scales, mxfp8, nvfp4, int8 …), each as one
tensor before it is packed.

| in the file (weight `L.weight`) | in the state dict |
|---|---|
| `L.weight` codes, `L.weight_scale` and other scales, `L.comfy_quant`, perhaps `L.input_scale` | `L.weight`, the host's |
| `scaled_fp8` marker, `L.weight` fp8, `L.scale_weight`, perhaps `L.scale_input` | `L.weight`, the host's |

The host's own code reads the parts and gives the values: its `convert_old_quants` and the layer of
its `mixed_precision_ops`. So a format that a newer host reads is read with it, and one that this
host lacks is told before the host fails on it.
"""
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor import get_layout_class

from ..ops.bounded_json import read_json
from ..ops.packed_layout import QuantizedTensor
from .files.container import WeightFile, WeightFileError, first_line, safe_repr
from .out_of_memory import is_out_of_memory

MARK = ".comfy_quant"
SMOOTHING = ".pre_quant_scale"  # what a layer multiplies its input by
# in the metadata of a file: what `comfy_quant` says of each layer
SETTINGS = "_quantization_metadata"
# formats of two codes a byte whose layout does not tell the shape of the weight
HALF_STORED = ("convrot_w4a4",)
# of asym_w4a8_int8, whose layout does not tell it either: (rows, groups of columns)
GROUP_SCALES = "weight_s_rel"
# formats of which a version of ComfyUI is known that reads them
READ_BY = {"asym_w4a8_int8": "0.33"}


class UnreadFormatError(ValueError):
    """A layer in a quantised format that this host does not read. The message says which, as a part
    of a sentence."""


def as_tensors(file: WeightFile, state_dict: dict[str, torch.Tensor],
               prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of a file with one quantised tensor of the host, which shows float32, in place
    of each weight's parts.

    Nothing is copied. What such a layer multiplies its input by stays, as `L.pre_quant_scale`.
    Stacked experts stay in their
    parts: only the host's layer for them reads those. prefix: of the model. Raises WeightFileError.
    """
    state_dict, _ = comfy.utils.convert_old_quants(state_dict, model_prefix=prefix,
                                                   metadata=file.text_metadata)
    out = dict(state_dict)
    out.pop(f"{prefix}scaled_fp8", None)
    layer_class = _layer_class()
    for layer, names in _parts_of_layers(state_dict).items():
        codes = state_dict.get(f"{layer}.weight")
        if not layer.startswith(prefix):
            continue
        if codes is None:  # the metadata of a file name layers that it lacks
            del out[f"{layer}{MARK}"]
        elif codes.ndim == 2:
            parts = {name: out.pop(name) for name in names}
            try:
                out[f"{layer}.weight"] = _weight(layer_class, layer, parts)
            except UnreadFormatError as error:
                raise _unread(file, layer, error) from error
    return out


def reject_unread_layers(file: WeightFile, state_dict: Mapping[str, torch.Tensor]):
    """Raise WeightFileError where a layer of a file is in a quantised format that this host does
    not read, or not right."""
    found = find_unread_layer(state_dict, state_dict.__getitem__, file.metadata)
    if found is not None:
        raise _unread(file, *found)


def find_unread_layer(names: Iterable[str], read: Callable[[str], torch.Tensor],
                      metadata: Mapping[str, Any]) -> tuple[str, UnreadFormatError] | None:
    """Return the first layer that the host does not read of those in quantised formats, and why;
    None where it reads all.

    Args:
        names: of the tensors of a file.
        read: gives a tensor by its name.
        metadata: of the file.
    """
    settings = _settings(metadata)
    names = dict.fromkeys(names)
    layer_class = _layer_class()
    for layer, parts in _parts_of_layers([*names,
                                          *(f"{layer}{MARK}" for layer in settings)]).items():
        if f"{layer}.weight" not in names:
            continue
        tensors = {name: read(name) for name in parts if name in names}
        if layer in settings:
            tensors[f"{layer}{MARK}"] = _as_bytes(settings[layer])
        try:
            if tensors[f"{layer}.weight"].ndim == 2:
                _weight(layer_class, layer, tensors)
            else:
                _layer_settings(layer, tensors)
        except UnreadFormatError as error:
            return layer, error
    return None


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Layer -> what the metadata of a file say of its format."""
    try:
        return dict(read_json(metadata[SETTINGS])["layers"]) if SETTINGS in metadata else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # which the host says


def _as_bytes(settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _layer_class() -> type:
    return comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear


def _parts_of_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> the names of the tensors that its quantised weight is made of, in the order of
    `names`."""
    names = dict.fromkeys(names)
    layers = {name.removesuffix(MARK): [] for name in names if name.endswith(MARK)}
    for name in names:
        layer, _, part = name.rpartition(".")
        if layer in layers and (part.startswith("weight") or part in ("input_scale", MARK[1:])):
            layers[layer].append(name)
    return layers


def _unread(file: WeightFile, layer: str, error: UnreadFormatError) -> WeightFileError:
    name = f"{layer}.weight"
    return file.error_at(
        name,
        f"{safe_repr(name)} is in a quantised format that this ComfyUI does not read ({error})",
        "Update ComfyUI, or get another conversion.")


def _layer_settings(layer: str, parts: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """What a file says of one layer's format, which this host knows. Raises UnreadFormatError."""
    try:
        settings = read_json(parts[f"{layer}{MARK}"].numpy().tobytes())
        name = settings.get("format")
    except (ValueError, AttributeError) as error:
        raise UnreadFormatError("its comfy_quant is not a JSON object") from error
    if not isinstance(name, str):
        raise UnreadFormatError("its comfy_quant names none")
    if name not in QUANT_ALGOS:
        raise UnreadFormatError(
            safe_repr(name) + (f", which ComfyUI {READ_BY[name]} does" if name in READ_BY else ""))
    return settings


def _weight(layer_class: type, layer: str, parts: dict[str, torch.Tensor]) -> QuantizedTensor:
    """The host's tensor of one weight, made by the host's layer, which takes `parts` out. Raises
    UnreadFormatError."""
    settings = _layer_settings(layer, parts)
    name = settings["format"]
    try:
        rows, columns = _shape(name, settings, layer, parts)
        module = layer_class(columns, rows, bias=False)
        module._load_from_state_dict(parts, f"{layer}.", {}, False, [], [], [])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UnreadFormatError(f"{name}: {first_line(error)}") from error
    ignored = next((part for part in parts if part.startswith(f"{layer}.weight")), None)
    if ignored is not None:  # the host would leave it out, and compute with other values
        raise UnreadFormatError(f"{name} with {safe_repr(ignored.removeprefix(f'{layer}.'))}")
    return module.weight.detach()


def _shape(name: str, settings: Mapping, layer: str,
           parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """The shape of a weight whose codes are stored; with the padding to whole blocks that some
    formats have."""
    rows, stored = parts[f"{layer}.weight"].shape
    layout = get_layout_class(QUANT_ALGOS[name]["comfy_tensor_layout"])
    if hasattr(layout, "get_logical_shape_from_storage"):
        return layout.get_logical_shape_from_storage((rows, stored))
    if f"{layer}.{GROUP_SCALES}" not in parts:
        return rows, stored * (2 if name in HALF_STORED else 1)
    further = settings.get("params", {})
    group = settings.get("group_size",
                         further.get("group_size", 16) if isinstance(further, dict) else 16)
    columns = parts[f"{layer}.{GROUP_SCALES}"].shape[1] * int(group)
    if stored * 2 != columns and not (hasattr(layout, "bits") and stored * 4 == columns * 3):
        # which the host would take for 4
        raise ValueError(f"it has {stored * 8 / columns:g} bits a value")
    return rows, columns
