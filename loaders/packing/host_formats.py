"""Weights in the host's own quantised formats (fp8 with scales, mxfp8, nvfp4, int8 …), each as one tensor before it is packed.

| in the file (weight `L.weight`) | in the state dict |
|---|---|
| `L.weight` codes, `L.weight_scale`, `L.comfy_quant`, perhaps `L.weight_scale_2`, `L.input_scale` | `L.weight`, the host's |
| `scaled_fp8` marker, `L.weight` fp8, `L.scale_weight`, perhaps `L.scale_input` | `L.weight`, the host's |

The host's own code reads the parts and gives the values: its `convert_old_quants` and the layer of its `mixed_precision_ops`.
"""
import json
from collections.abc import Mapping

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor import get_layout_class

from ...ops.tensor import QuantizedTensor
from ..files.container import WeightFile, shown

MARK = ".comfy_quant"
PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant")
HALF_STORED = ("convrot_w4a4",)  # formats of two codes a byte whose layout does not tell the shape of the weight


def as_tensors(file: WeightFile, state_dict: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of a file with one quantised tensor of the host, which shows float32, in place of each weight's parts.

    Nothing is copied. What such a layer multiplies its input by stays, as `L.pre_quant_scale`. Stacked experts stay in their
    parts: only the host's layer for them reads those. prefix: of the model. Raises WeightFileError.
    """
    metadata = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
    state_dict, _ = comfy.utils.convert_old_quants(state_dict, model_prefix=prefix, metadata=metadata)
    out = dict(state_dict)
    out.pop(f"{prefix}scaled_fp8", None)
    layer_class = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear
    for key in state_dict:
        layer = key.removesuffix(MARK)
        codes = state_dict.get(f"{layer}.weight")
        if layer == key or not key.startswith(prefix):
            continue
        if codes is None:  # the metadata of a file name layers that it lacks
            del out[key]
        elif codes.ndim == 2:
            parts = {f"{layer}.{part}": out.pop(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in out}
            out[f"{layer}.weight"] = _weight(file, layer_class, layer, parts)
    return out


def _weight(file: WeightFile, layer_class: type, layer: str, parts: dict[str, torch.Tensor]) -> QuantizedTensor:
    """The host's tensor of one weight, made by the host's layer, which takes `parts` out."""
    name = f"{layer}.weight"
    try:
        settings = json.loads(bytes(parts[f"{layer}{MARK}"].tolist()))
        rows, columns = _shape(settings, parts[name].shape)
        module = layer_class(columns, rows, bias=False)
        module._load_from_state_dict(parts, f"{layer}.", {}, False, [], [], [])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise file.error_at(name, f"{shown(name)} is in a quantised format that this ComfyUI does not read ({error})",
                            "Update ComfyUI, or get another conversion.") from error
    return module.weight.detach()


def _shape(settings: Mapping, stored: torch.Size) -> tuple[int, int]:
    """The shape of a weight of which this shape is stored; with the padding to whole blocks that some formats have."""
    name = settings["format"]
    layout = get_layout_class(QUANT_ALGOS[name]["comfy_tensor_layout"])
    if hasattr(layout, "get_logical_shape_from_storage"):
        return layout.get_logical_shape_from_storage(tuple(stored))
    return stored[0], stored[1] * (2 if name in HALF_STORED else 1)
