"""How much a LoRA changes a weight, without ever making the change itself.

Values are the host's: an adapter of `comfy.weight_adapter` with its tuple `weights`, or ("diff",
(tensor,)) and its like.
"""
import collections
import math

import torch

from ...ops import product
from ...ops.adapters import LoHa, LoKr, LoRA, adapter_fields, alpha_scale, rank_of
from ...ops.packed_layout import is_packed
from .model_blocks import block_of, key_of

SAMPLED_ROWS = 64

CHANGE_TYPES = {
    "lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"
}


def change_type(value) -> str:
    """What people call this kind of change."""
    if isinstance(value, tuple):
        return {"diff": "full difference", "set": "full weight"}.get(value[0], value[0])
    kind = CHANGE_TYPES.get(value.name, value.name)
    if getattr(adapter_fields(value), "dora_scale", None) is None:
        return kind
    return "DoRA" if value.name == "lora" else f"{kind} with DoRA"


def change_norm(value, weight_norm: float | None) -> float | None:
    """Frobenius norm of what a value adds to a weight at strength 1; None where it is not known
    cheaply.

    weight_norm: of the weight, which OFT turns. A DoRA scale is left out of account. LoHa:
    estimated from some rows.
    """
    if isinstance(value, tuple):
        return value[1][0].float().norm().item() if value[0] == "diff" else None
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
        left, right = (_product_norm(up.float(), down.float())
                       if whole is None else whole.float().norm().item()
                       for whole, up, down in ((parts.w1, parts.a1, parts.b1), (parts.w2, parts.a2,
                                                                                parts.b2)))
        return left * right * _scale(value)
    if value.name == "oft" and weight_norm is not None:
        blocks = parts.blocks.float()
        turn = blocks - blocks.transpose(1, 2)
        limit = parts.limit or 0
        if 0 < limit < turn.norm():
            turn = turn * (limit / turn.norm())
        eye = torch.eye(blocks.shape[1], dtype=torch.float32)
        turned = torch.linalg.solve(eye - turn, eye + turn) - eye  # Cayley; its two factors commute
        return weight_norm * turned.norm().item() / math.sqrt(blocks.shape[0] * blocks.shape[1])
    return None


def block_changes(patches: dict,
                  weights: dict[str, torch.Tensor]) -> dict[str, tuple[float | None, float | None]]:
    """Block -> (norm of what patches change in it at strength 1, norm of its weights); None for
    what is not known.

    patches: as the host's `add_patches` takes them. weights: the model's, by the keys the patches
    name.
    """
    norms = {key: _weight_norm(weights[key]) for key in dict.fromkeys(map(key_of, patches))}
    changes, sizes = collections.defaultdict(list), collections.defaultdict(list)
    for target, value in patches.items():
        changes[block_of(key_of(target))].append(change_norm(value, norms[key_of(target)]))
    for key, norm in norms.items():
        sizes[block_of(key)].append(norm)
    return {
        block: (_combined_norm(changes[block]), _combined_norm(sizes[block])) for block in changes
    }


def _scale(value) -> float:
    """What alpha makes of a product of factors."""
    rank = rank_of(value)
    return 1.0 if rank is None else abs(alpha_scale(adapter_fields(value).alpha, rank))


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left @ right||, of (N, r) and (r, K), through their r x r Gram matrices."""
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()


def _combined_norm(norms: list[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm * norm for norm in known)) if known else None


def _sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """int64 (`SAMPLED_ROWS` at most,): rows of a weight, evenly spread."""
    rows = weight.shape[0]
    return torch.linspace(0, rows - 1, min(SAMPLED_ROWS, rows), dtype=torch.float32).long()


def _weight_norm(weight: torch.Tensor) -> float | None:
    """Frobenius norm of a weight, estimated from some of its rows; None for a weight without
    values."""
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
