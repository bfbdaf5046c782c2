"""Reads weights in the host's own quantised formats (fp8 with scales, mxfp8, nvfp4, int8 ...).

A layer `L` has several tensors in the file and becomes one tensor, `L.weight`:

| format | tensors in the file |
|---|---|
| `comfy_quant` | `L.weight` (codes), `L.weight_scale` and other scales, `L.comfy_quant`, |
| | optional `L.input_scale` |
| `scaled_fp8` | `scaled_fp8` (marker), `L.weight` (fp8), `L.scale_weight`, |
| | optional `L.scale_input` |

`files.comfy_formats` makes packed tensors of those that it knows. The host's own code reads others:
the layers of its `mixed_precision_ops`. So a newer host adds its formats here too, and a format
that neither reads is reported before the host fails on it.
"""
import json
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor import get_layout_class

from ..ops.bounded_json import read_json
from ..ops.packed_layout import QuantizedTensor, is_packed
from ..ops.packed_tensor import PackedTensor
from .files.comfy_formats import (
    DOWN,
    GROUP_SCALE,
    MARK,
    READERS,
    SETTINGS,
    SMOOTH,
    SMOOTHING,
    UP,
    PartError,
    format_of,
    pack_parts,
    shifted_bias,
)
from .files.container import WeightFile, WeightFileError, first_line, safe_repr
from .out_of_memory import is_out_of_memory

# formats with two codes in a byte; their layout does not know the shape of the weight
HALF_STORED = ("convrot_w4a4",)
# format -> the first version of ComfyUI that reads it
READ_BY = {"asym_w4a8_int8": "0.33"}
# whose names do not begin with "weight"
OTHER_PARTS = (MARK[1:], "input_scale", SMOOTHING, SMOOTH, DOWN, UP)


class UnreadFormatError(ValueError):
    """This host cannot read a quantised format; the message is part of a sentence."""


def as_tensors(file: WeightFile, state_dict: dict[str, torch.Tensor], prefix: str = "",
               formats: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Joins the parts of each quantised weight into one tensor, without copying the codes.

    The parts of stacked experts stay apart: only the host's layer for experts reads them.

    Args:
        file: the file of the state dict.
        state_dict: of the file; it is not changed.
        prefix: of the names of the model; other weights stay as they are.
        formats: names of those whose layers become packed tensors; others stay in parts for the
            host. None: all become packed tensors or the host's own.

    Returns:
        A state dict whose quantised weights are `QuantizedTensor`s of dtype float32.

    Raises:
        WeightFileError: if a layer is damaged or in a format that is not read.
    """
    _reject_damaged_settings(file)
    state_dict, _ = comfy.utils.convert_old_quants(dict(state_dict), model_prefix=prefix,
                                                   metadata=file.text_metadata)
    out = dict(state_dict)
    out.pop(f"{prefix}scaled_fp8", None)
    layer_class = _layer_class()
    for layer, names in _parts_of_layers(state_dict).items():
        codes = state_dict.get(f"{layer}.weight")
        if not layer.startswith(prefix):
            continue
        if codes is None or is_packed(codes):  # the metadata lists layers that are not here
            del out[f"{layer}{MARK}"]
        elif codes.ndim in (2, 4):  # 4: in tiles
            parts = {name: state_dict[name] for name in names}
            bias = state_dict.get(f"{layer}.bias")
            try:
                weight, bias = _packed(layer, parts, bias, READERS if formats is None else formats)
                if weight is None and formats is None:
                    weight = _host_weight(layer_class, layer, parts)
            except UnreadFormatError as error:
                raise _unread_layer_error(file, layer, error) from error
            if weight is not None:
                for name in names:
                    del out[name]
                out[f"{layer}.weight"] = weight
                if bias is not None:
                    out[f"{layer}.bias"] = bias
    return out


def reject_unread_layers(file: WeightFile, state_dict: Mapping[str, torch.Tensor]):
    """Raises WeightFileError if a layer is damaged or in a format that this host does not read."""
    _reject_damaged_settings(file)
    unread = find_unread_layer(state_dict, state_dict.__getitem__, file.metadata)
    if unread is not None:
        raise _unread_layer_error(file, *unread)


def has_format(names: Iterable[str], read: Callable[[str], torch.Tensor],
               metadata: Mapping[str, Any], formats: Container[str]) -> bool:
    """Returns whether a layer of a file is in one of some formats; see `find_unread_layer`.

    Raises:
        UnreadFormatError: if the settings in the metadata are damaged.
    """
    names = dict.fromkeys(names)
    if any(name.endswith("scaled_fp8") for name in names) and "float8_e4m3fn" in formats:
        return True
    settings = list(_settings(metadata).values())
    for name in names:
        if name.endswith(MARK):
            try:
                settings.append(_read_settings(read(name)))
            except UnreadFormatError:
                pass  # the reader says what is wrong
    return any(isinstance(one, dict) and format_of(one) in formats for one in settings)


def find_unread_layer(names: Iterable[str], read: Callable[[str], torch.Tensor],
                      metadata: Mapping[str, Any]) -> tuple[str, UnreadFormatError] | None:
    """Finds the first quantised layer that this host does not read.

    Args:
        names: of the tensors of a file.
        read: returns a tensor by its name.
        metadata: of the file.

    Returns:
        (layer, error), or None if the host reads all layers.

    Raises:
        UnreadFormatError: if the settings in the metadata are damaged.
    """
    settings = _settings(metadata)
    names = dict.fromkeys(names)
    layer_class = _layer_class()
    marks = [f"{layer}{MARK}" for layer in settings]
    for layer, parts in _parts_of_layers([*names, *marks]).items():
        if f"{layer}.weight" not in names:
            continue
        tensors = {name: read(name) for name in parts if name in names}
        if layer in settings:
            tensors[f"{layer}{MARK}"] = _as_bytes(settings[layer])
        try:
            if is_packed(tensors[f"{layer}.weight"]):
                continue
            if tensors[f"{layer}.weight"].ndim == 2:
                _host_weight(layer_class, layer, tensors)
            else:
                _layer_settings(layer, tensors)
        except UnreadFormatError as error:
            return layer, error
    return None


def _reject_damaged_settings(file: WeightFile):
    try:
        _settings(file.metadata)
    except UnreadFormatError as error:
        raise WeightFileError(
            f"{file.path.name}: {error}. Download the file again, or get another conversion."
        ) from error


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns layer -> settings of its format, from the metadata of a file.

    Raises:
        UnreadFormatError: if they are damaged.
    """
    if SETTINGS not in metadata:
        return {}
    try:
        return dict(read_json(metadata[SETTINGS])["layers"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadFormatError(
            f'its metadata {SETTINGS} is no JSON object with the formats of its "layers"'
        ) from error


def _as_bytes(settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _layer_class() -> type:
    return comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear


def _parts_of_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns layer -> names of the tensors of its quantised weight, in the order of `names`."""
    names = dict.fromkeys(names)
    layers = {name.removesuffix(MARK): [] for name in names if name.endswith(MARK)}
    for name in names:
        layer, _, part = name.rpartition(".")
        if layer in layers and (part.startswith("weight") or part in OTHER_PARTS):
            layers[layer].append(name)
    return layers


def _unread_layer_error(file: WeightFile, layer: str,
                        error: UnreadFormatError) -> WeightFileError:
    name = f"{layer}.weight"
    return file.error_at(
        name,
        f"{safe_repr(name)} is in a quantised format that this ComfyUI does not read ({error})",
        "Update ComfyUI, or get another conversion.")


def _layer_settings(layer: str, parts: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """Returns the settings of one layer's format; raises UnreadFormatError if it is unknown."""
    settings = _read_settings(parts[f"{layer}{MARK}"])
    name = settings.get("format")
    if not isinstance(name, str):
        raise UnreadFormatError("its comfy_quant names no format")
    if name not in QUANT_ALGOS:
        needed = [f"ComfyUI {READ_BY[name]}"] if name in READ_BY else []
        if name in READERS:
            needed.append("`host formats` at automatic")
        by = f", which needs {' or '.join(needed)}" if needed else ""
        raise UnreadFormatError(f"{safe_repr(name)}{by}")
    return settings


def _read_settings(mark: torch.Tensor) -> dict[str, Any]:
    """Returns the JSON of a layer's `comfy_quant`."""
    try:
        settings = read_json(mark.numpy().tobytes())
    except ValueError as error:
        raise UnreadFormatError("its comfy_quant is not a JSON object") from error
    if not isinstance(settings, dict):
        raise UnreadFormatError("its comfy_quant is not a JSON object")
    return settings


def _packed(layer: str, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None,
            formats: Container[str]) -> tuple[PackedTensor | None, torch.Tensor | None]:
    """Returns a packed tensor of one weight, None where it is in none of the formats, and the bias.

    Raises:
        UnreadFormatError: if a part is wrong.
    """
    settings = _read_settings(parts[f"{layer}{MARK}"])
    format_name = format_of(settings)
    if format_name not in formats:
        return None, bias
    tensors = {name.removeprefix(f"{layer}."): tensor for name, tensor in parts.items()}
    try:
        weight = pack_parts(settings, tensors)
        return weight, bias if weight is None else shifted_bias(settings, tensors, bias)
    except PartError as error:
        raise UnreadFormatError(f"{format_name}: {error}") from error


def _host_weight(layer_class: type, layer: str,
                 parts: dict[str, torch.Tensor]) -> QuantizedTensor:
    """Builds the host's tensor of one weight; the host's layer pops what it uses from `parts`.

    Raises:
        UnreadFormatError: if the host does not read the format or a part is wrong.
    """
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
    if ignored is not None:  # without it the host would compute with wrong values
        raise UnreadFormatError(f"{name} with {safe_repr(ignored.removeprefix(f'{layer}.'))}")
    return module.weight.detach()


def _shape(name: str, settings: Mapping, layer: str,
           parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Returns a weight's shape, including the padding to whole blocks that some formats have."""
    rows, stored = parts[f"{layer}.weight"].shape
    layout = get_layout_class(QUANT_ALGOS[name]["comfy_tensor_layout"])
    if hasattr(layout, "get_logical_shape_from_storage"):
        return layout.get_logical_shape_from_storage((rows, stored))
    if f"{layer}.{GROUP_SCALE}" not in parts:  # of asym_w4a8_int8, (rows, groups of columns)
        return rows, stored * (2 if name in HALF_STORED else 1)
    params = settings.get("params", {})
    default = params.get("group_size", 16) if isinstance(params, dict) else 16
    group_size = settings.get("group_size", default)
    columns = parts[f"{layer}.{GROUP_SCALE}"].shape[1] * int(group_size)
    if stored * 2 != columns and not (hasattr(layout, "bits") and stored * 4 == columns * 3):
        # The host would take it for 4 bits.
        raise ValueError(f"it has {stored * 8 / columns:g} bits a value")
    return rows, columns
