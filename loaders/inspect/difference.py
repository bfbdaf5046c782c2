"""How far each tensor of a model is from the same tensor of a reference: its relative error."""
import dataclasses
from collections.abc import Iterator, Mapping

import torch

from ...ops.packed_layout import is_packed
from ...ops.row_slicing import dense, take_rows
from ..comfy_keys import to_comfy_keys
from ..comfy_quant import MARK, as_tensors
from ..encoders.arch import arch_of, strip_prefix
from ..files.container import FileChangeGuard
from ..progress import Progress
from .contents import Contents

SLICE_VALUES = 1 << 22  # dequantised at a time: 16 MB as float32
WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "model.")
# Scales beside a weight in the host's own formats: it is multiplied by them.
SCALES = ("_scale", ".scale_weight")


def relative_errors(contents: Contents, reference: Contents) -> dict[str, float]:
    """Name -> root of the sum of squares of the difference over that of the reference, of matrices
    and more in both.

    Goes tensor by tensor, some rows at a time, in float32. The user can cancel it: the host's
    exception goes on. Raises WeightFileError for a weight in a format of the host's that it does
    not read, and where a file is written to meanwhile.
    """
    contents, reference = _join_parts(contents), _join_parts(reference)
    ours, theirs = (_without_wrapper(both.tensors) for both in (contents, reference))
    # named by different programs
    if len(ours.keys() & theirs.keys()) * 2 < min(len(ours), len(theirs)):
        ours, theirs = _in_the_hosts_names(contents), _in_the_hosts_names(reference)
    shared = [
        name for name in ours
        if name in theirs and ours[name].shape == theirs[name].shape and ours[name].ndim > 1
    ]
    pieces = [(name, rows) for name in shared for rows in _slices(ours[name], theirs[name])]
    if not pieces:
        return {}
    guard = FileChangeGuard.of([*ours.values(), *theirs.values()])
    wrong, whole = dict.fromkeys(shared, 0.0), dict.fromkeys(shared, 0.0)
    for name, rows in Progress(stages=1).track(pieces):
        guard()
        values, expected = (_values(name, rows, weights) for weights in (ours, theirs))
        wrong[name] += (values - expected).square_().sum(dtype=torch.float64).item()
        whole[name] += expected.square().sum(dtype=torch.float64).item()
    return {
        name: (wrong[name] / whole[name]) ** 0.5 if whole[name] else float(wrong[name] > 0)
        for name in shared
    }


def _join_parts(contents: Contents) -> Contents:
    """The same with one tensor for each weight that a file has in parts in the host's own
    formats."""
    if contents.file is None or not any(name.endswith(MARK) for name in contents.tensors):
        return contents
    return dataclasses.replace(contents, tensors=as_tensors(contents.file, contents.tensors))


def _without_wrapper(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = next((start for start in WRAPPERS if sum(name.startswith(start)
                                                      for name in tensors) * 2 > len(tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _in_the_hosts_names(contents: Contents) -> dict[str, torch.Tensor]:
    """The tensors of a diffusion model or text encoder under the host's names; parts that it has
    joined are copies."""
    tensors = strip_prefix(dict(contents.tensors))
    arch = arch_of(tensors)
    return _without_wrapper(
        arch.convert(tensors, contents.metadata) if arch else to_comfy_keys(dict(contents.tensors)))


def _slices(*tensors: torch.Tensor) -> Iterator[slice]:
    """Rows to go through at a time: all where rows of one of the tensors cannot be had without
    dequantising the whole."""
    shape = tensors[0].shape
    step = max(1, SLICE_VALUES // max(1, shape[1:].numel()))
    if not all(_has_rows(tensor) for tensor in tensors):
        step = shape[0]
    return (slice(first, min(shape[0], first + step)) for first in range(0, shape[0], max(1, step)))


def _has_rows(tensor: torch.Tensor) -> bool:
    if is_packed(tensor):
        return tensor.shape[1:].numel() % tensor.layout_cls.format.block_length == 0
    return not _is_the_hosts(tensor)


def _is_the_hosts(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in a quantised format of the host."""
    return not is_packed(tensor) and getattr(tensor, "_layout_cls", None) is not None


def _values(name: str, rows: slice, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Some rows of a weight in float32."""
    tensor = weights[name]
    if _is_the_hosts(tensor):
        return tensor.dequantize()[rows].float()
    values = dense(take_rows(tensor, rows)).float() if is_packed(tensor) else tensor[rows].float()
    layer = name.removesuffix(".weight")
    scale = next((weights[key] for key in (name + SCALES[0], layer + SCALES[1]) if key in weights),
                 None)
    if scale is None or tensor.dtype.itemsize != 1:
        return values
    scale = scale.float()
    return values * (
        scale[rows].view(-1, *[1] * (values.ndim - 1)) if scale.numel() == len(tensor) else scale
    )
