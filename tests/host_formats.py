"""Layers in the quantised formats that the host has itself, written by the host's own quantisers."""
import json

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

HOST_FORMATS = tuple(QUANT_ALGOS)
OPTIONS = {"float8_e4m3fn": {"scale": "recalculate"}, "float8_e5m2": {"scale": "recalculate"},
           "int8_tensorwise": {"per_channel": True}}


def in_host_format(name: str, values: torch.Tensor, format_name: str, **config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file holds of one weight (rows, columns), and its dense float32 values; config: goes into its `comfy_quant`."""
    layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
    quantised = QuantizedTensor.from_float(values, layout, **OPTIONS.get(format_name, {}))
    marker = json.dumps({"format": format_name, **config}).encode()
    parts = {f"{name.removesuffix('weight')}comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}
    return parts | quantised.state_dict(name), quantised.dequantize()
