"""Layers in the quantised formats that the host has itself, written by the host's own
quantisers."""
import json

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import save_file

HOST_FORMATS = tuple(QUANT_ALGOS)
# of which the host looks up rows
TABLE_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
OPTIONS = {"float8_e4m3fn": {"scale": "recalculate"}, "float8_e5m2": {"scale": "recalculate"},
           "int8_tensorwise": {"per_channel": True}}


def in_host_format(name: str, values: torch.Tensor, format_name: str,
                   **config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file holds of one weight (rows, columns), and its dense float32 values; config: goes
    into its `comfy_quant`.

    Skips the test where the host lacks the format.
    """
    if format_name not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no format {format_name}")
    layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
    quantised = QuantizedTensor.from_float(values, layout, **OPTIONS.get(format_name, {}))
    marker = json.dumps({"format": format_name, **config}).encode()
    parts = {
        f"{name.removesuffix('weight')}comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)
    }
    return parts | quantised.state_dict(name), quantised.dequantize()


def is_nf4(name: str) -> bool:
    """Whether a matrix of Flux is NF4 in mixed files."""
    # the host reads some shapes of the model from layers outside of blocks
    return "txt" in name or "_blocks." not in name


def write_mixed(path: str, tensors: dict[str, torch.Tensor], format_name: str) -> tuple[dict, dict]:
    """Write a Flux of NF4 and of layers in a format of the host. Returns (its dense values, what
    the host itself can load)."""
    from devtools.files.bnb_files import quantised  # needs bitsandbytes

    stored, values, for_host = {}, {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            parts = {name: tensor}
            values[name] = for_host[name] = tensor
        elif is_nf4(name):
            parts, values[name] = quantised(tensor, "nf4")
            parts, for_host[name] = (
                {f"{name}{part}": value for part, value in parts.items()},
                values[name],
            )
        else:
            parts, values[name] = in_host_format(name, tensor, format_name)
            for_host |= parts
        stored |= parts
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    return values, {name: value.clone() for name, value in for_host.items()}
