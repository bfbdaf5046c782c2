"""Measures the relative error of each tensor of a model against the same tensor of a reference."""
import dataclasses
from collections.abc import Iterator, Mapping

import torch

from ...ops.layers.product import values_of
from ...ops.tensor.packed_layout import is_comfy_quantized, is_packed
from ...ops.tensor.packed_tensor import relabel
from ...ops.tensor.row_slicing import take_rows
from ..comfyui.comfy_quant_weights import as_tensors
from ..comfyui.contents import Contents
from ..comfyui.weight_keys import to_comfy_keys
from ..container.weight_file import FileChangeGuard
from ..encoders.arch import arch_of, strip_prefix
from ..progress import Progress
from ..quantizers.comfy_quant_formats import SMOOTHING
from ..quantizers.comfy_quant_marks import MARK

SLICE_VALUES = 1 << 22  # values dequantised at a time: 16 MB as float32
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")


def relative_errors(contents: Contents, reference: Contents) -> dict[str, float]:
    """Returns name -> relative error of each tensor with two or more dimensions in both models.

    The error is the root of the sum of squares of the difference, over that of the reference,
    computed in float32 on the CPU, some rows at a time. The host's exception for a cancelled prompt
    is raised.

    Raises:
        WeightFileError: a weight is in a quantised format that this ComfyUI does not read, or a
            file was written to meanwhile.
    """
    contents, reference = _join_parts(contents), _join_parts(reference)
    ours = _strip_prefix(contents.tensors)
    theirs = _strip_prefix(reference.tensors)
    if len(ours.keys() & theirs.keys()) * 2 < min(len(ours), len(theirs)):
        # The files have the keys of different programs.
        ours, theirs = _to_comfy_keys(contents), _to_comfy_keys(reference)
    shared = [
        name for name in ours
        if name in theirs and ours[name].shape == theirs[name].shape and ours[name].ndim > 1
    ]
    pieces = [(name, rows) for name in shared for rows in _slices(ours[name], theirs[name])]
    if not pieces:
        return {}
    guard = FileChangeGuard.of([*ours.values(), *theirs.values()])
    error_sums, sums = dict.fromkeys(shared, 0.0), dict.fromkeys(shared, 0.0)
    for name, rows in Progress("comparing").track(pieces):
        guard()
        values, expected = _values(name, rows, ours).cpu(), _values(name, rows, theirs).cpu()
        error_sums[name] += (values - expected).square_().sum(dtype=torch.float64).item()
        sums[name] += expected.square().sum(dtype=torch.float64).item()
    return {name: _relative_error(error_sums[name], sums[name]) for name in shared}


def _relative_error(error_sum: float, reference_sum: float) -> float:
    if reference_sum:
        return (error_sum / reference_sum) ** 0.5
    return 1.0 if error_sum > 0 else 0.0


def _join_parts(contents: Contents) -> Contents:
    """Joins the parts of each weight in one of ComfyUI's own quantised formats into one tensor."""
    if contents.file is None or not any(name.endswith(MARK) for name in contents.tensors):
        return contents
    return dataclasses.replace(contents, tensors=as_tensors(contents.file, contents.tensors))


def _strip_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the prefix that more than half of the names have."""
    for prefix in PREFIXES:
        if sum(name.startswith(prefix) for name in tensors) * 2 > len(tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _to_comfy_keys(contents: Contents) -> dict[str, torch.Tensor]:
    """Returns the tensors of a diffusion model or text encoder under ComfyUI's keys.

    Tensors that the conversion joins or reorders are copies.
    """
    tensors = strip_prefix(dict(contents.tensors))
    arch = arch_of(tensors)
    if arch:
        return _strip_prefix(arch.convert(tensors, contents.metadata))
    return _strip_prefix(to_comfy_keys(dict(contents.tensors)))


def _slices(*tensors: torch.Tensor) -> Iterator[slice]:
    """Splits the rows of tensors of one shape; a single slice if one of them has no row access."""
    shape = tensors[0].shape
    step = max(1, SLICE_VALUES // max(1, shape[1:].numel()))
    if not all(_has_row_access(tensor) for tensor in tensors):
        step = shape[0]
    return (slice(first, min(shape[0], first + step)) for first in range(0, shape[0], max(1, step)))


def _has_row_access(tensor: torch.Tensor) -> bool:
    """Returns whether some rows can be dequantised without the others."""
    if is_packed(tensor):
        return tensor.shape[1:].numel() % tensor.params.format.block_length == 0
    return not is_comfy_quantized(tensor)


def _values(name: str, rows: slice, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns some rows of a weight in float32."""
    tensor = weights[name]
    if is_comfy_quantized(tensor):
        values = relabel(tensor, dtype=torch.float32).dequantize()[rows]
        smoothing = weights.get(f"{name.removesuffix('.weight')}.{SMOOTHING}")
        return values if smoothing is None else values * smoothing.to(values)
    return values_of(take_rows(tensor, rows) if is_packed(tensor) else tensor[rows]).float()
