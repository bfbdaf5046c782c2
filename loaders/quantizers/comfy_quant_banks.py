"""Banks of experts in ComfyUI's own formats: the linear layers of all experts in one weight.

| codes `L.weight` | who writes them |
|---|---|
| (E, N, W), `num_experts` E in the settings | ComfyUI's `MoEExperts` |
| (E * N, W), likewise: a flat bank | ComfyUI from 0.38 on |

W is the bytes of a row. Scales are those of all rows, of each expert, or one. ComfyUI 0.30 does not
read flat banks, and takes rotated codes of a bank for ones that are not.
"""
from collections.abc import Mapping

import torch

from ...ops.tensor.packed_tensor import PackedTensor, relabel
from ..container.weight_file import describe, safe_repr
from .comfy_quant import has_rows_of_experts, pack_parts
from .comfy_quant_formats import (
    CODEBOOK,
    GROUP_SCALE,
    IGNORED,
    ROW_SCALE,
    SCALE,
    Settings,
    known_format,
)
from .parts import PartError, Parts

EXPERTS = "num_experts"
PARTS = (SCALE, GROUP_SCALE, ROW_SCALE, CODEBOOK)


def is_bank(settings: Settings, codes: torch.Tensor) -> bool:
    """Returns whether a weight is a bank of experts."""
    return EXPERTS in settings or has_rows_of_experts(codes)


def pack_bank(settings: Settings, parts: Mapping[str, torch.Tensor]) -> PackedTensor | None:
    """Makes one packed tensor of the parts of a bank.

    Args:
        settings: of the layer's `comfy_quant`.
        parts: the last parts of their names -> the layer's tensors.

    Returns:
        A packed tensor of (E, N, K); None for a format, or with a part, that is not read here.

    Raises:
        PartError: the parts do not belong together.
    """
    parts = {name: part for name, part in parts.items() if name not in IGNORED}
    codes = parts.pop("weight")
    known = known_format(settings)
    if known is None or not known.has_banks or set(parts) - set(PARTS) or codes.ndim not in (2, 3):
        return None
    experts = settings.get(EXPERTS, len(codes))
    if type(experts) is not int or experts < 1 or (
            len(codes) % experts if codes.ndim == 2 else len(codes) != experts):
        raise PartError(f"it is {describe(codes)}, expected the rows of {safe_repr(experts)}"
                        f" experts, which its {EXPERTS} says")
    codes = codes.flatten(0, -2)
    of_rows: Parts = {"weight": codes}
    for name, part in parts.items():
        of_rows[name] = part if name == CODEBOOK else _of_rows(
            part, len(codes), experts, has_columns=name == GROUP_SCALE)
    packed = pack_parts(settings, of_rows)
    if packed is None:
        return None
    return relabel(packed, shape=torch.Size((experts, len(codes) // experts, packed.shape[1])))


def _of_rows(part: torch.Tensor, rows: int, experts: int, has_columns: bool) -> torch.Tensor:
    """Returns numbers of a bank as those of its rows; ones that do not fit stay as they are."""
    if has_columns:
        return part.flatten(0, 1) if part.ndim == 3 else part
    if part.numel() == experts != rows:
        return part.flatten().repeat_interleave(rows // experts)
    return part.flatten() if part.numel() == rows else part
