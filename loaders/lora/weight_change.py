"""Estimates how much a LoRA changes a weight, without computing the change itself.

Values are the host's: an adapter of `comfy.weight_adapter`, or a tuple such as ("diff", (tensor,)).
"""
import collections
import math
from typing import Any

import torch

from ...ops.layers import product
from ...ops.patches.adapters import (
    LoHa,
    LoKr,
    LoRA,
    OrthogonalAdapter,
    adapter_fields,
    alpha_scale,
    rank_of,
)
from ...ops.tensor.packed_layout import is_packed
from .model_blocks import block_name, weight_key

SAMPLED_ROWS = 64
LARGE_VALUES = 0.1  # root mean square of a change that may be 100 times as large as its weight

CHANGE_TYPES = {
    "lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"
}


def change_type(value: Any) -> str:
    """Returns the type of a change, as people know it: 'LoRA', 'LoKr with DoRA' ..."""
    if isinstance(value, tuple):
        patch_type: str = value[0]
        return {"diff": "full difference", "set": "full weight"}.get(patch_type, patch_type)
    name: str = value.name
    adapter_type = CHANGE_TYPES.get(name, name)
    if getattr(adapter_fields(value), "dora_scale", None) is None:
        return adapter_type
    return "DoRA" if name == "lora" else f"{adapter_type} with DoRA"


def change_norm(value: Any, weight_norm: float | None) -> float | None:
    """Returns the Frobenius norm of what a value adds to a weight at strength 1.

    DoRA scales are ignored where the product is not zero; LoHa is estimated from some rows.

    Args:
        value: of a patch.
        weight_norm: of the weight, which OFT needs; None if it is not known.

    Returns:
        The norm; None if it is not known cheaply.
    """
    if isinstance(value, tuple):
        return value[1][0].float().norm().item() if value[0] == "diff" else None
    norm = _adapter_norm(value, weight_norm)
    has_scale = getattr(adapter_fields(value), "dora_scale", None) is not None
    return None if norm == 0 and has_scale else norm


def _adapter_norm(value: Any, weight_norm: float | None) -> float | None:
    """Returns `change_norm` of an adapter without its DoRA scale."""
    parts = adapter_fields(value)
    if isinstance(parts, LoRA):
        down = parts.down
        if parts.mid is not None:
            down = torch.einsum("ij...,jk->ik...", parts.mid.float(), down.float().flatten(1))
        return _scale(value) * _product_norm(parts.up.float().flatten(1), down.float().flatten(1))
    if isinstance(parts, LoHa) and parts.core1 is None:
        rows = _sampled_rows(parts.a1)
        first, second = (a[rows].float() @ b.float()
                         for a, b in ((parts.a1, parts.b1), (parts.a2, parts.b2)))
        sampled = (first * second).norm().item()
        return _scale(value) * sampled * math.sqrt(parts.a1.shape[0] / len(rows))
    if isinstance(parts, LoKr) and parts.core is None:
        left = _factor_norm(parts.w1, parts.a1, parts.b1)
        right = _factor_norm(parts.w2, parts.a2, parts.b2)
        return left * right * _scale(value)
    if (isinstance(parts, OrthogonalAdapter) and value.name == "oft" and parts.rescale is None
            and weight_norm is not None):
        blocks = parts.blocks.float()
        skew = blocks - blocks.transpose(1, 2)
        limit = (parts.limit or 0) * blocks.shape[:2].numel()
        if 0 < limit < skew.norm():
            skew = skew * (limit / skew.norm())
        eye = torch.eye(blocks.shape[1], dtype=torch.float32)
        # Cayley transform; its two factors commute
        change = torch.linalg.solve(eye - skew, eye + skew) - eye
        return weight_norm * change.norm().item() / math.sqrt(blocks.shape[0] * blocks.shape[1])
    return None


def is_large(value: Any, weight: torch.Tensor) -> bool:
    """Returns whether what a value adds to a weight may be far larger than weights are, by the
    norms of some rows of its factors alone."""
    if isinstance(value, tuple):
        norm = (_weight_norm(value[1][0]) or 0.0) if value[0] == "diff" else 0.0
    else:
        norm = _scale(value) * math.prod(
            _weight_norm(part) or 0.0 for part in value.weights
            if isinstance(part, torch.Tensor) and part.ndim > 1)
    return norm > LARGE_VALUES * math.sqrt(weight.numel())


def block_changes(patches: dict,
                  weights: dict[str, torch.Tensor]) -> dict[str, tuple[float | None, float | None]]:
    """Estimates the changes of all blocks.

    Args:
        patches: as the host's `add_patches` takes them.
        weights: key -> weight of the model.

    Returns:
        Block -> (norm of its change at strength 1, norm of its weights); None where not known.
    """
    norms = {key: _weight_norm(weights[key]) for key in dict.fromkeys(map(weight_key, patches))}
    change_norms = collections.defaultdict(list)
    weight_norms = collections.defaultdict(list)
    for target, value in patches.items():
        key = weight_key(target)
        change_norms[block_name(key)].append(change_norm(value, norms[key]))
    for key, norm in norms.items():
        weight_norms[block_name(key)].append(norm)
    return {
        block: (_combined_norm(change_norms[block]), _combined_norm(weight_norms[block]))
        for block in change_norms
    }


def _scale(value: Any) -> float:
    """Returns the scale that alpha gives to a product of factors."""
    rank = rank_of(value)
    if rank is None:
        return 1.0
    return abs(alpha_scale(getattr(adapter_fields(value), "alpha", None), rank))


def _factor_norm(whole: torch.Tensor | None, up: Any, down: Any) -> float:
    """Returns the norm of a factor of a LoKr, which is stored whole or as `up @ down`."""
    if whole is not None:
        return whole.float().norm().item()
    return _product_norm(up.float(), down.float())


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns ||left @ right|| of (N, r) and (r, K), through their r x r Gram matrices."""
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()


def _combined_norm(norms: list[float | None]) -> float | None:
    """Returns the norm of all parts that are known; None if that says nothing."""
    norm = math.sqrt(sum(norm * norm for norm in norms if norm is not None))
    return norm if norm or None not in norms else None


def _sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns the indices of at most `SAMPLED_ROWS` evenly spread rows: (rows,), int64."""
    rows = weight.shape[0]
    return torch.linspace(0, rows - 1, min(SAMPLED_ROWS, rows), dtype=torch.float32).long()


def _weight_norm(weight: torch.Tensor) -> float | None:
    """Estimates a weight's Frobenius norm from some rows; None for a weight without values."""
    if weight.is_meta or not weight.ndim:
        return None
    rows = _sampled_rows(weight).to(weight.device)
    if not is_packed(weight):
        values = weight[rows]
    elif weight.ndim == 2:
        values = product.embedding(rows, weight, torch.float32)
    else:
        values = product.dequantize(weight, torch.float32)[rows]
    return values.float().norm().item() * math.sqrt(weight.shape[0] / len(rows))
