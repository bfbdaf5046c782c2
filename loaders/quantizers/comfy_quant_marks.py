"""Says which layers of a file are in ComfyUI's own formats: by tensors, by metadata, by a marker.

| in the file | since |
|---|---|
| `L.comfy_quant`, settings in JSON as uint8, beside each weight `L.weight` | 0.4 |
| `_quantization_metadata` in the metadata: {"layers": {L: settings}} | 0.4 |
| `scaled_fp8`, a tensor of any name that ends so, beside `L.scale_weight` | before |

Tools change the names of tensors and leave those in the metadata, or the marker, as they were.
"""
import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ...ops.stable_names import short_error_name

MARK = ".comfy_quant"
# key of a file's metadata that has the `comfy_quant` settings of all layers
SETTINGS = "_quantization_metadata"
OLD_MARKER, OLD_SCALE = "scaled_fp8", ".scale_weight"
BOOLEAN_TEXT = re.compile(rb'"(true|false)"', re.IGNORECASE)
BOOLEANS = {"true": True, "false": False}
CHECKPOINT = "model.diffusion_model."  # before the names of a checkpoint's model
# what tools put before the names of a model's layers
WRAPPERS = re.compile(
    r"^(?:(?:model\.)?diffusion_model|model|transformer|module|unet|net|dit|_orig_mod)\.")


@short_error_name
class MarkError(ValueError):
    """The marks of a file are damaged or contradict each other; part of a sentence."""


def read_mark(data: bytes) -> dict[str, Any]:
    """Returns the settings in a layer's `comfy_quant`. Raises MarkError if they are damaged."""
    try:
        settings = read_json(data.rstrip(b"\0"))
    except ValueError as error:
        raise MarkError("its comfy_quant is not a JSON object") from error
    if not isinstance(settings, dict):
        raise MarkError("its comfy_quant is not a JSON object")
    return with_booleans(settings)


def with_booleans(settings: Any) -> Any:
    """Returns settings, in which booleans may be texts, with booleans."""
    if isinstance(settings, dict):
        return {name: with_booleans(value) for name, value in settings.items()}
    return BOOLEANS.get(settings.lower(), settings) if isinstance(settings, str) else settings


def mark_of(settings: Any) -> torch.Tensor:
    """Returns the `comfy_quant` of a layer with some settings, uint8."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def listed_layers(metadata: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns the layers that a file's metadata lists, under their names in the file.

    Args:
        metadata: of the file.
        names: of its tensors.

    Returns:
        Layer -> settings; a layer that the file has not keeps its name.

    Raises:
        MarkError: the metadata is damaged.
    """
    layers, names = _layers_in(metadata), dict.fromkeys(names)
    by_stem: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            by_stem.setdefault(_stem(layer), []).append(layer)

    def in_file(layer: str) -> str:
        if f"{layer}.weight" in names:
            return layer
        same = by_stem.get(_stem(layer.removesuffix(".weight")), [])
        return same[0] if len(same) == 1 else layer

    return {in_file(layer): settings for layer, settings in layers.items()}


def _layers_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the layers that a file's metadata lists, under the names there."""
    if SETTINGS not in metadata:
        return {}
    try:
        return dict(with_booleans(read_json(metadata[SETTINGS])["layers"]).items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MarkError(
            f'its metadata {SETTINGS} is not a JSON object with the formats of its "layers"'
        ) from error


def has_other_names(metadata: Mapping[str, Any], names: Collection[str]) -> bool:
    """Returns whether marks name layers otherwise than the tensors do, which the host overlooks.

    Raises:
        MarkError: the metadata is damaged.
    """
    if not listed_layers(metadata, names).keys() <= _layers_in(metadata).keys():
        return True
    return OLD_MARKER in names and any(
        name.startswith(CHECKPOINT) and name.endswith(OLD_SCALE) for name in names)


def marked_layers(metadata: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Returns the layers that a file marks as ComfyUI's, with their names in the file.

    Damaged metadata, which `listed_layers` reports, marks none.
    """
    try:
        listed = listed_layers(metadata, names)
    except MarkError:
        listed = {}
    scaled = [] if SETTINGS in metadata else [
        name.removesuffix(OLD_SCALE) for marker in old_markers(names) for name in names
        if name.startswith(marker.removesuffix(OLD_MARKER)) and name.endswith(OLD_SCALE)]
    return {*listed, *scaled, *(name.removesuffix(MARK) for name in names if name.endswith(MARK))}


def settings_of_layers(metadata: Mapping[str, Any],
                       tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Returns the marked layers of a file -> their settings; damaged marks are left out.

    Args:
        metadata: of the file.
        tensors: of the file.
    """
    found: dict[str, Any] = dict.fromkeys(marked_layers(metadata, tensors))
    for layer in found:
        weight, mark = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}{MARK}")
        if mark is not None and mark.itemsize == 1 and not mark.is_floating_point():
            with contextlib.suppress(MarkError):
                found[layer] = read_mark(bytes_of(mark))
        elif weight is not None and f"{layer}{OLD_SCALE}" in tensors:
            found[layer] = {"format": str(weight.dtype).removeprefix("torch.")}
    with contextlib.suppress(MarkError):
        found |= listed_layers(metadata, tensors)
    return {layer: settings for layer, settings in found.items() if isinstance(settings, dict)}


def bytes_of(mark: torch.Tensor) -> bytes:
    """Returns the bytes of a `comfy_quant`, uint8 or int8."""
    return mark.contiguous().view(torch.uint8).numpy().tobytes()


def old_markers(names: Iterable[str]) -> list[str]:
    """Returns the names of the tensors that mark old scaled fp8.

    One marks what begins with the part of its name before `OLD_MARKER`.
    """
    return [name for name in names if name.rpartition(".")[2] == OLD_MARKER]


def _stem(layer: str) -> str:
    """Returns a layer's name without what tools put before it."""
    while True:
        shorter = WRAPPERS.sub("", layer)
        if shorter == layer:
            return layer
        layer = shorter
