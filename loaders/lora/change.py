"""How much a LoRA changes a weight, without ever making the change itself.

Values are the host's: an adapter of `comfy.weight_adapter` with its tuple `weights`, or ("diff", (tensor,)) and its like.
"""
import collections
import math

import torch

from ...ops import product
from ...ops.tensor import is_packed
from .model_blocks import block_of, key_of

SAMPLED_ROWS = 64

# Where an adapter keeps its DoRA scale among its weights.
DORA_SCALE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}


def kind_of(value) -> str:
    """What people call this kind of change."""
    if isinstance(value, tuple):
        return {"diff": "full difference", "set": "full weight"}.get(value[0], value[0])
    kind = KINDS.get(value.name, value.name)
    at = DORA_SCALE.get(value.name)
    if at is None or value.weights[at] is None:
        return kind
    return "DoRA" if value.name == "lora" else f"{kind} with DoRA"


def rank_of(value) -> int | None:
    """Rank of the factors; None where the change has none."""
    if isinstance(value, tuple):
        return None
    weights = value.weights
    factor = {"lora": 1, "loha": 1}.get(value.name)
    if factor is not None:
        return weights[factor].shape[0]
    if value.name == "lokr":
        return next((factor.shape[0] for factor in (weights[6], weights[4]) if factor is not None), None)
    return min(weights[0].shape) if value.name == "glora" else None


def shape_of(value) -> tuple[int, int | None]:
    """(rows, columns) of the weight a value is made for, further dimensions flattened; columns None where it fits any."""
    if isinstance(value, tuple):
        return _flat(value[1][0].shape)
    weights = value.weights
    if value.name == "lora":
        up, down, middle = weights[0], weights[1], weights[3]
        return up.shape[0], down.shape[1:].numel() * (1 if middle is None else middle.shape[2:].numel())
    if value.name == "loha":
        first, second, core = weights[0], weights[1], weights[5]
        if core is None:
            return first.shape[0], second.shape[1]
        return first.shape[1], second.shape[1] * core.shape[2:].numel()
    if value.name == "lokr":
        left = weights[0].shape if weights[0] is not None else (weights[3].shape[0], weights[4].shape[1])
        if weights[1] is not None:
            right = _flat(weights[1].shape)
        elif weights[7] is None:
            right = weights[5].shape[0], weights[6].shape[1]
        else:
            right = weights[5].shape[1], weights[6].shape[1] * weights[7].shape[2:].numel()
        return left[0] * right[0], left[1] * right[1]
    if value.name == "glora":
        first, second = weights[2].flatten(1), weights[3].flatten(1)
        if first.shape[0] < first.shape[1]:
            first, second = second, first  # the order of LyCORIS's first version
        return first.shape[0], second.shape[1]
    blocks = weights[0]  # OFT (n, size, size), BOFT (steps, n, size, size): they turn the rows
    return blocks.shape[-3] * blocks.shape[-1], None


def change_norm(value, weight_norm: float | None) -> float | None:
    """Frobenius norm of what a value adds to a weight at strength 1; None where it is not known cheaply.

    weight_norm: of the weight, which OFT turns. A DoRA scale is left out of account. LoHa: estimated from some rows.
    """
    if isinstance(value, tuple):
        return value[1][0].float().norm().item() if value[0] == "diff" else None
    weights = value.weights
    if value.name == "lora":
        up, down, alpha, middle = weights[:4]
        if middle is not None:
            down = torch.einsum("ij...,jk->ik...", middle.float(), down.float().flatten(1))
        return _scale(alpha, weights[1].shape[0]) * _product_norm(up.float().flatten(1), down.float().flatten(1))
    if value.name == "loha" and weights[5] is None:
        rows = torch.linspace(0, weights[0].shape[0] - 1, min(SAMPLED_ROWS, weights[0].shape[0])).long()
        first, second = (weights[at][rows].float() @ weights[at + 1].float() for at in (0, 3))
        sampled = (first * second).norm().item()
        return _scale(weights[2], weights[1].shape[0]) * sampled * math.sqrt(weights[0].shape[0] / len(rows))
    if value.name == "lokr" and weights[7] is None:
        left, right = (_product_norm(up.float(), down.float()) if whole is None else whole.float().norm().item()
                       for whole, up, down in (weights[0:1] + weights[3:5], weights[1:2] + weights[5:7]))
        rank = rank_of(value)
        return left * right * (1.0 if rank is None else _scale(weights[2], rank))
    if value.name == "oft" and weight_norm is not None:
        blocks = weights[0].float()
        turn = blocks - blocks.transpose(1, 2)
        limit = weights[2] or 0
        if 0 < limit < turn.norm():
            turn = turn * (limit / turn.norm())
        eye = torch.eye(blocks.shape[1])
        turned = torch.linalg.solve(eye - turn, eye + turn) - eye  # Cayley; its two factors commute
        return weight_norm * turned.norm().item() / math.sqrt(blocks.shape[0] * blocks.shape[1])
    return None


def block_changes(patches: dict, weights: dict[str, torch.Tensor]) -> dict[str, tuple[float | None, float | None]]:
    """Block -> (norm of what patches change in it at strength 1, norm of its weights); None for what is not known.

    patches: as the host's `add_patches` takes them. weights: the model's, by the keys the patches name.
    """
    norms = {key: _weight_norm(weights[key]) for key in dict.fromkeys(map(key_of, patches))}
    changes, sizes = collections.defaultdict(list), collections.defaultdict(list)
    for target, value in patches.items():
        changes[block_of(key_of(target))].append(change_norm(value, norms[key_of(target)]))
    for key, norm in norms.items():
        sizes[block_of(key)].append(norm)
    return {block: (_together(changes[block]), _together(sizes[block])) for block in changes}


def _flat(shape: torch.Size) -> tuple[int, int]:
    return shape[0] if shape else 1, shape[1:].numel()


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else abs(alpha) / rank


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left @ right||, of (N, r) and (r, K), through their r x r Gram matrices."""
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()


def _together(norms: list[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm * norm for norm in known)) if known else None


def _weight_norm(weight: torch.Tensor) -> float | None:
    """Frobenius norm of a weight, estimated from some of its rows; None for a weight without values."""
    if weight.is_meta or not weight.ndim:
        return None
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLED_ROWS, weight.shape[0]), device=weight.device).long()
    if not is_packed(weight):
        values = weight[rows]
    elif weight.ndim == 2:
        values = product.embedding(rows, weight, torch.float32)
    else:
        values = product.unpack(weight, torch.float32)[rows]
    return values.float().norm().item() * math.sqrt(weight.shape[0] / len(rows))
