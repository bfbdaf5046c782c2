"""Files of a small Flux in ComfyUI's own formats, with marks wherever tools leave them."""
import json

import torch
from host_formats import in_host_format, mark_of
from kernel_writer import rotated
from pack_api import QuantizedTensor
from patched_models import relative, tiny_flux
from safetensors.torch import save_file

CHECKPOINT = "model.diffusion_model."

Tensors = dict[str, torch.Tensor]


def flux_in(format_name: str, group: int = 0) -> tuple[Tensors, dict[str, dict], Tensors]:
    """`in_format` of the large weights of a Flux."""
    return in_format(tiny_flux(), "_blocks.", format_name, group)


def in_format(weights: Tensors, inside: str, format_name: str,
              group: int = 0) -> tuple[Tensors, dict[str, dict], Tensors]:
    """Weights whose matrices of some names are in a format: what a file holds of them without
    marks, layer -> settings, and their values.

    inside: what is in those names.
    group: columns that are rotated together first, 0: none; some formats rotate by themselves.
    """
    group = 0 if format_name in ("convrot_w4a4", "asym_w4a8_int8") else group
    stored, settings, values = {}, {}, {}
    for name, value in weights.items():
        if value.ndim != 2 or inside not in name:
            stored[name] = values[name] = value.bfloat16().float()
            continue
        turned = rotated(value, group).float() if group else value
        parts, values[name] = in_host_format(name, turned, format_name)
        layer = name.removesuffix(".weight")
        settings[layer] = json.loads(bytes(parts.pop(f"{layer}.comfy_quant").tolist()))
        if group:
            values[name] = rotated(values[name], group).float()
            settings[layer] |= {"convrot": True, "convrot_groupsize": group}
        stored |= parts
    return stored, settings, values


def old_scaled(dtype: torch.dtype, marker: str | None = "scaled_fp8",
               weights: Tensors | None = None, inside: str = "_blocks.") -> tuple[Tensors, Tensors]:
    """The same in scaled fp8 as it was before `comfy_quant`, and its values; or other weights."""
    stored, values = {}, {}
    for number, (name, value) in enumerate((weights or tiny_flux()).items()):
        stored[name] = values[name] = value.bfloat16().float()
        if value.ndim == 2 and inside in name:
            layer, scale = name.removesuffix(".weight"), value.abs().amax() / (
                0.9 * torch.finfo(dtype).max)
            scale = scale.reshape(()) if number % 2 else scale.reshape(1)
            stored[name] = (value / scale).to(dtype)
            stored[f"{layer}.scale_weight"] = scale
            values[name] = stored[name].float() * scale
    if marker is not None:
        stored[marker] = torch.empty(0, dtype=dtype)
    return stored, values


def write(path, tensors: Tensors, layers: dict | None = None, marks: dict | None = None,
          prefix: str = "") -> str:
    """Writes a file. layers: of the metadata; marks: layer -> settings, or bytes, beside weights"""
    metadata = None
    if layers is not None:
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    tensors = dict(tensors)
    for layer, given in (marks or {}).items():
        tensors[f"{layer}.comfy_quant"] = mark_of(given)
    tensors = {prefix + name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata)
    return str(path)


def weight_error(patcher, values: Tensors) -> float:
    """The largest error of a weight in a loaded model, relative to its largest value."""
    weights = dict(patcher.model.diffusion_model.named_parameters())
    values = {name.replace("norm.scale", "norm.weight"): value for name, value in values.items()}
    return max(relative(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight,
                        values[name.replace("norm.scale", "norm.weight")])
               for name, weight in weights.items())
