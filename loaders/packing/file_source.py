"""A model file or a folder of diffusers as a source to be saved: read row by row, and let go of at once; LoRAs as patches.

The host's model is built without values, on the meta device, where LoRAs need to know its layers.
"""
import os
from collections.abc import Sequence
from pathlib import Path

import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import torch

from ...ops.packed import relabelled
from ...ops.patcher.values import Patch
from ...ops.rows import take_rows
from ...ops.tensor import QuantizedTensor, is_packed
from ..detection import answer
from ..diffusers_names import JoinedRows
from ..diffusion import refuse_other_kinds
from ..files import open_weights
from ..files.container import FileChangeGuard, map_file
from ..handover import model_prefix
from ..lora.apply import apply_lora
from ..lora.file import load_lora_file
from ..lora.fit import check_lora
from ..model_names import in_the_hosts_names
from .host_formats import as_tensors
from .obstacles import SaveError
from .source import DIFFUSION_MODEL, Source, Weight
from .while_loading import SMOOTHING

# What tells kinds of one architecture, beside the model's weights in a whole checkpoint; the host reads them in a model's file.
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def of_file(path: str | os.PathLike, loras: Sequence[tuple[str, float]] = ()) -> Source:
    """The diffusion model in a file or folder, of a whole checkpoint that alone. loras: (path, strength), in order.

    Raises WeightFileError and SaveError.
    """
    file = open_weights(path)
    refuse_other_kinds(file)
    guard = file.guard + FileChangeGuard.over(map_file(lora) for lora, _ in loras)
    state_dict = file.state_dict()
    prefix = model_prefix(state_dict)
    markers = {name: state_dict[name] for name in MARKERS if name in state_dict}
    state_dict = as_tensors(file, {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}, prefix)
    found = in_the_hosts_names({name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}, later=True)
    found |= markers
    smoothings = {name.removesuffix(SMOOTHING): found.pop(name) for name in list(found) if name.endswith(SMOOTHING)}
    model = answer(_empty_model, found) if loras else None
    patches, notes = _patches_of(model, loras, os.path.basename(path)) if loras else ({}, [])
    weights = {name: _weight(name, tensor, smoothings.get(name.removesuffix(".weight")), patches.get(name, ()))
               for name, tensor in found.items() if not name.endswith((".input_scale", ".scale_input"))}
    missing = patches.keys() - weights.keys()
    if missing:
        raise SaveError(f"{os.path.basename(path)} has no {min(missing)}, which a LoRA changes. Get another conversion of the"
                        " model.")
    return Source(os.path.basename(path), weights, notes=notes, let_go=file.let_go, guard=guard,
                  paths=(*file.paths, *(Path(lora) for lora, _ in loras)))


def _weight(name: str, tensor, smoothing: torch.Tensor | None, patches: Sequence[Patch]) -> Weight:
    joined = isinstance(tensor, JoinedRows)
    held = tensor.parts[0][0] if joined else tensor

    def read(start: int, stop: int) -> torch.Tensor:
        if joined:
            return _joined(tensor, start, stop)
        values = _rows(tensor, start, stop)
        return values if smoothing is None else values * smoothing.float()

    return Weight(name, f"{DIFFUSION_MODEL}{name}", tuple(tensor.shape), held, read, tuple(patches),
                  is_whole=not joined and smoothing is None)


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows in float32, a copy."""
    if is_packed(tensor):
        part = take_rows(relabelled(tensor, dtype=torch.float32), slice(start, stop))
        return part.dequantize() if is_packed(part) else part.clone()
    if isinstance(tensor, QuantizedTensor):
        return relabelled(tensor, dtype=torch.float32).dequantize()[start:stop].clone()
    return (tensor[start:stop] if tensor.ndim else tensor).to(torch.float32, copy=True)


def _joined(rows: JoinedRows, start: int, stop: int) -> torch.Tensor:
    parts, at = [], 0
    for tensor, first, last in rows.parts:
        low, high = max(start - at, 0), min(stop - at, last - first)
        if low < high:
            parts.append(_rows(tensor, first + low, first + high))
        at += last - first
    return torch.cat(parts)


def _empty_model(tensors) -> comfy.model_patcher.ModelPatcher | None:
    """The host's model for these names and shapes, without values; None where it knows none."""
    shapes = {name: torch.empty(tensor.shape, dtype=torch.float32, device="meta") for name, tensor in tensors.items()}
    config = comfy.model_detection.model_config_from_unet(shapes, "")
    if config is None:
        return None
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model(shapes, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _patches_of(model, loras: Sequence[tuple[str, float]], name: str) -> tuple[dict[str, list[Patch]], list[str]]:
    """(name of a weight -> the host's patches for it, what people should know of LoRAs that fit in part)."""
    if model is None:
        raise SaveError(f"{name} is no model that this ComfyUI knows, so it cannot be told which layers a LoRA is for. Update"
                        " ComfyUI, or save it without a LoRA.")
    notes = []
    for path, strength in loras:
        report = check_lora(model, None, *load_lora_file(path), measure=False)
        if report.fits == "no":
            raise SaveError(f"{os.path.basename(path)} is not applied. {report.verdict}")
        if report.fits != "yes":
            notes.append(f"{os.path.basename(path)}: {report.verdict}")
        model, _ = apply_lora(model, None, report, strength, 0)
    return {key.removeprefix(DIFFUSION_MODEL): patches for key, patches in model.patches.items()}, notes
