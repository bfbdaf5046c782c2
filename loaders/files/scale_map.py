"""Reads fp8 codes whose scales are in a file next to theirs, `NAME_map.pt`.

It is {"module": {layer: one number}}, by which the weights of these layers are multiplied; also
HunyuanImage 2.1's. Source: HunyuanVideo `hyvideo/modules/fp8_optimization.py`.
"""
from collections.abc import Mapping
from pathlib import Path

import torch

from ..container.weight_file import WeightFile, WeightFileError
from ..quantizers.comfy_quant_formats import FP8, SCALE
from ..quantizers.comfy_quant_marks import MARK, mark_of
from ..quantizers.judgement import judged
from .torch_file import read_torch_object

MOST_BYTES = 64 << 20
TORCH = (".pt", ".pth", ".ckpt", ".bin")


def scale_map(path: str | Path) -> Path | None:
    """Returns the path of the file with the scales of a file, None where there is none."""
    path = Path(path)
    beside = path.with_name(f"{path.stem}_map.pt")
    return beside if beside.is_file() else None


def add_scales(file: WeightFile, tensors: dict[str, torch.Tensor]):
    """Gives codes without scales those of the `scale_map`, and judges the file again.

    Each entry must be one number above 0 for a matrix of fp8, and each such matrix must have one;
    else none is used, and the file's refusal says so.

    Args:
        file: with its `judgement`.
        tensors: as stored; changed in place.
    """
    beside, refused = scale_map(file.path), file.judgement.refused
    if beside is None or refused is None or any(SCALE in name for name in tensors) or (
            refused.name not in tensors or tensors[refused.name].dtype not in FP8):
        return
    try:
        scales = _scales_in(beside, tensors)
    except WeightFileError as error:
        problem = f"{refused.problem}, and {beside.name} next to it is not used: {error}"
        file.judgement = file.judgement._replace(refused=refused._replace(problem=problem))
        return
    for layer, scale in scales.items():
        kind = str(tensors[f"{layer}.weight"].dtype).removeprefix("torch.")
        tensors |= {f"{layer}.{SCALE}": scale, f"{layer}{MARK}": mark_of({"format": kind})}
    with judged(file, tensors):
        pass


def _scales_in(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns layer -> scale, float32. Raises WeightFileError if they are not those of a file."""
    if path.stat().st_size > MOST_BYTES:
        raise WeightFileError(f"it has more than {MOST_BYTES >> 20} MB")
    content = read_torch_object(str(path), "a file of scales")
    while isinstance(content, dict) and len(content) == 1 and isinstance(
            next(iter(content.values())), dict):
        content = next(iter(content.values()))
    scales = {}
    for layer, number in content.items() if isinstance(content, dict) else ():
        scale = torch.as_tensor(number, dtype=torch.float32) if isinstance(
            number, (int, float, torch.Tensor)) else torch.empty(0, dtype=torch.float32)
        weight = tensors.get(f"{layer}.weight")
        if weight is None or weight.dtype not in FP8 or weight.ndim != 2 or scale.numel() != 1 or (
                not 0 < scale.item() < float("inf")):
            raise WeightFileError(f"its entry {layer!a:.100} is no scale of such a matrix")
        scales[layer] = scale.reshape(())
    lost = next((name for name, tensor in tensors.items() if tensor.dtype in FP8
                 and tensor.ndim == 2 and name.removesuffix(".weight") not in scales), None)
    if lost is not None:
        raise WeightFileError(f"it has no scale for {lost!a:.100}")
    return scales
