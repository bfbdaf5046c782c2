"""Reads which weights of a GGUF file are in ComfyUI's own formats, which ggml has no types for.

molbal's ComfyUI-GGUF writes them ("Q8_CR", "Q4_CR"): the codes are a tensor `L.weight` of ggml's
I8, their scales another, `L.weight_scale`, and the metadata has JSON for each weight.

| `comfy.gguf.quant.L.weight` | `L.weight` | `L.weight_scale` | in safetensors |
|---|---|---|---|
| format int8_tensorwise, convrot, weight_rotated | I8 (N, K) | F32 (N, 1) | int8_tensorwise |
| format int4_cr, backing w4a4, orig_shape [N, K] | I8 (N, K / 2) | F16 (N,) | convrot_w4a4 |

Codes of int8_tensorwise are not rotated without `weight_rotated`, whatever `convrot` says: an older
version wrote so. Other formats mean what they mean in safetensors, and so do tensors
`L.comfy_quant`, whose JSON is bytes of I8 here.

Source: molbal/ComfyUI-GGUF, `tools/convert.py` and `loader.py` of September 2026.
"""
import json
from collections.abc import Mapping
from typing import Any

from ...ops.bounded_json import read_json
from ..container.weight_file import WeightFileError, safe_repr
from ..quantizers.comfy_quant_marks import SETTINGS

PREFIX = "comfy.gguf.quant."  # before the name of a weight in the metadata
WEIGHT = ".weight"
RETIRED = ("int4_cr", "int4_compact_gemm", "int4_pytorch")  # but int4_cr with a backing


def marks_as_metadata(file_name: str, metadata: Mapping[str, Any],
                      shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns the marks of a GGUF file as metadata of a safetensors file, {} where it has none.

    Args:
        file_name: for messages.
        metadata: of the file.
        shapes: of its tensors.

    Raises:
        WeightFileError: a mark is damaged, or of a format that is not read.
    """
    layers = {}
    for key in metadata:
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX)
        try:
            layers[name.removesuffix(WEIGHT)] = _settings(name, metadata[key], shapes)
        except ValueError as error:
            raise WeightFileError(
                f"{file_name}: the metadata {safe_repr(key)} {error}. Get another conversion of the"
                " model.") from error
    return {SETTINGS: json.dumps({"layers": layers})} if layers else {}


def _settings(name: str, text: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the settings of a weight as a `comfy_quant` has them.

    Raises:
        ValueError: what is wrong with them, as a predicate.
    """
    if not name.endswith(WEIGHT):
        raise ValueError(f"names no weight, expected a name that ends with {WEIGHT!r}")
    try:
        settings = read_json(text)
    except (ValueError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("is not a JSON object")
    mark = dict(settings)
    format_name = mark.get("format")
    if not isinstance(format_name, str):
        raise ValueError("names no format")
    if format_name == "int8_tensorwise" and mark.get("weight_rotated") is not True:
        mark = {key: value for key, value in mark.items() if not key.startswith("convrot")}
    elif format_name == "int4_cr" and mark.get("backing") == "w4a4":
        codes, original = shapes.get(name), mark.get("orig_shape")
        if codes is not None and (
                len(codes) != 2 or original not in (None, [codes[0], codes[1] * 2])):
            raise ValueError(f"has the shape {safe_repr(original)}, expected (N, K) for codes of"
                             f" (N, K / 2), which are {codes}")
        mark = {"format": "convrot_w4a4"} | {
            key: value for key, value in mark.items() if key == "convrot_groupsize"}
    elif format_name in RETIRED:
        raise ValueError(f"names the format {format_name!r}, which its writer has given up")
    return mark
