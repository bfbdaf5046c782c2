"""The host's patches for one weight: where each kind keeps what, the shape it is made for, and why
it does not fit another.

A value is an adapter of `comfy.weight_adapter`, whose tuple `weights` has places without names, or
("diff", (tensor,)) and its like. The host fails in the midst of a step, or logs an error at each,
where the factors of an adapter do not fit.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from comfy.weight_adapter import (
    BOFTAdapter,
    GLoRAAdapter,
    LoHaAdapter,
    LoKrAdapter,
    LoRAAdapter,
    OFTAdapter,
    WeightAdapterBase,
)


class LoRA(NamedTuple):
    """up @ down; with `mid`, a convolution's Tucker product."""
    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None = None
    mid: torch.Tensor | None = None
    dora_scale: torch.Tensor | None = None
    reshape: Sequence[int] | None = None


class LoHa(NamedTuple):
    """(a1 @ b1) * (a2 @ b2), value by value; with cores, of two Tucker products."""
    a1: torch.Tensor
    b1: torch.Tensor
    alpha: float | None
    a2: torch.Tensor
    b2: torch.Tensor
    core1: torch.Tensor | None = None
    core2: torch.Tensor | None = None
    dora_scale: torch.Tensor | None = None


class LoKr(NamedTuple):
    """The Kronecker product of w1 (or a1 @ b1) and w2 (or a2 @ b2, or a Tucker product)."""
    w1: torch.Tensor | None
    w2: torch.Tensor | None
    alpha: float | None
    a1: torch.Tensor | None
    b1: torch.Tensor | None
    a2: torch.Tensor | None
    b2: torch.Tensor | None
    core: torch.Tensor | None = None
    dora_scale: torch.Tensor | None = None


class GLoRA(NamedTuple):
    """W a1 a2 + b1 b2; in older files W a2 a1 + b2 b1."""
    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    alpha: float | None = None
    dora_scale: torch.Tensor | None = None


class OrthogonalAdapter(NamedTuple):
    """OFT and BOFT turn the rows. blocks: (..., blocks, size, size). limit: of the turn's norm,
    where one is set."""
    blocks: torch.Tensor
    rescale: torch.Tensor | None = None
    limit: float | None = None
    dora_scale: torch.Tensor | None = None


ADAPTER_FIELDS = {
    LoRAAdapter: LoRA,
    LoHaAdapter: LoHa,
    LoKrAdapter: LoKr,
    GLoRAAdapter: GLoRA,
    OFTAdapter: OrthogonalAdapter,
    BOFTAdapter: OrthogonalAdapter,
}
# add to the weight what does not depend on it, unless they have a DoRA scale
SUMS = (LoRAAdapter, LoHaAdapter, LoKrAdapter)


def adapter_fields(
        adapter: WeightAdapterBase) -> LoRA | LoHa | LoKr | GLoRA | OrthogonalAdapter | None:
    """What an adapter holds, by name; None of a kind not known here."""
    places = next((places for kind, places in ADAPTER_FIELDS.items() if isinstance(adapter, kind)),
                  None)
    return None if places is None else places(*adapter.weights[:len(places._fields)])


def adapter_tensors(value) -> list[torch.Tensor]:
    """The factors of an adapter; none of other patches, which stay where they are."""
    if not isinstance(value, WeightAdapterBase):
        return []
    items = [
        item for part in value.weights
        for item in (part if isinstance(part, (tuple, list)) else (part,))
    ]
    return [item for item in items if isinstance(item, torch.Tensor)]


def to_device(value, device: torch.device):
    """An adapter with its factors on `device`. Other patches may hold whole models and stay where
    they are."""
    if not isinstance(value, WeightAdapterBase):
        return value
    return type(value)(value.loaded_keys, _tensors_to(value.weights, device))


def _tensors_to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_tensors_to(item, device) for item in value)
    return value


# --- what a patch does ---

def is_plain_lora(value) -> bool:
    """Whether a value can run as a low-rank branch, once it is known to be a sum."""
    return type(value) is LoRAAdapter and adapter_fields(value).mid is None


def lora_factors(adapter: LoRAAdapter) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up, down, the scale that its alpha gives) of a plain LoRA."""
    lora = adapter_fields(adapter)
    return lora.up, lora.down, alpha_scale(lora.alpha, lora.down.shape[0])


def alpha_scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def is_sum(patch: tuple) -> bool:
    """Whether a patch `(strength, value, strength_model, offset, function)` only adds to the weight
    something that does not depend on the weight."""
    _, value, strength_model, _, _ = patch
    if strength_model != 1.0:
        return False
    if isinstance(value, WeightAdapterBase):
        return type(value) in SUMS and adapter_fields(value).dora_scale is None
    if isinstance(value, list) or len(value) == 1:
        return True
    kind, data = value
    return kind == "diff" and not (len(data) > 1 and data[1]["pad_weight"])


def slice_patch(patch: tuple, start: int, stop: int) -> tuple | None:
    """The part of a patch that concerns some rows of the weight; None for a patch that needs the
    whole weight at once."""
    strength, value, strength_model, offset, function = patch
    if offset is not None or function is not None:
        return None
    parts = adapter_fields(value) if type(value) in SUMS else None
    if isinstance(parts, LoRA) and parts[3:] == (None, None, None):
        part = LoRAAdapter(value.loaded_keys, tuple(parts._replace(up=parts.up[start:stop])))
    elif isinstance(parts, LoHa) and parts[5:] == (None, None, None):
        part = LoHaAdapter(value.loaded_keys,
                           tuple(parts._replace(a1=parts.a1[start:stop], a2=parts.a2[start:stop])))
    elif isinstance(value, tuple) and len(value) == 1:
        part = value if value[0] is None else (value[0][start:stop],)
    elif isinstance(value, tuple) and value[0] in ("diff", "set") and len(value[1]) == 1:
        part = (value[0], (value[1][0][start:stop],))
    else:
        return None
    return strength, part, strength_model, None, None


def rank_of(value) -> int | None:
    """Rank of the factors; None where the change has none."""
    parts = adapter_fields(value) if isinstance(value, WeightAdapterBase) else None
    if isinstance(parts, LoRA):
        return parts.down.shape[0]
    if isinstance(parts, LoHa):
        return parts.b1.shape[0]
    if isinstance(parts, LoKr):
        return next((factor.shape[0] for factor in (parts.b2, parts.b1) if factor is not None),
                    None)
    return _glora_order(parts, None)[0] if isinstance(parts, GLoRA) else None


# --- what it is made for ---

def shape_of(value, target: Sequence[int] | None = None) -> tuple[int | None, int | None] | None:
    """(rows, columns) of the weight a value is made for, further dimensions flattened, None for
    what it leaves open.

    None instead of both: its factors contradict each other. target: shape of the weight it is to be
    applied to, where that is known; the host reads some GLoRAs in two ways, by it.
    """
    if isinstance(value, WeightAdapterBase):
        return (
            _adapter_shape(adapter_fields(value), target)
            if all(tensor.ndim > 1 for tensor in adapter_tensors(value))
            else None
        )
    tensor = _whole_tensor(value)
    if tensor is None:
        return None, None
    return tensor.shape[0] if tensor.shape else 1, tensor.shape[1:].numel()


def shape_mismatch(value, shape: Sequence[int],
                   offset: tuple[int, int, int] | None = None) -> str | None:
    """Why a value cannot be applied to a weight of `shape`, such as "its rank is 0"; None where it
    can.

    offset: (dimension, start, length) of the part of the weight that it is for.
    """
    target = list(shape)
    if offset is not None:
        dimension, start, length = offset
        if start + length > target[dimension]:
            return f"it is made for rows {start} to {start + length}, the weight has {target[dimension]}"
        target[dimension] = length
    if isinstance(value, WeightAdapterBase):
        if not all(tensor.numel() for tensor in adapter_tensors(value)):
            return "its rank is 0"
        made_for = shape_of(value, target)
        target = [target[0] if target else 1, torch.Size(target[1:]).numel()]
        if made_for is None:
            return "its factors do not fit each other"
    else:
        tensor = _whole_tensor(value)
        if tensor is None:
            return None
        made_for = tensor.shape
    if len(made_for) != len(target) or any(
        made not in (None, wanted) for made, wanted in zip(made_for, target)
    ):
        return f"it is made for a weight of {_describe(made_for)}, not of {_describe(target)}"
    return None


def corruption(value) -> str | None:
    """Why a value can be applied to no weight whatever its shape, or None. Reads all of it."""
    tensors = (
        adapter_tensors(value) if isinstance(value, WeightAdapterBase) else [_whole_tensor(value)]
    )
    if not all(
        tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors if tensor is not None
    ):
        return "it holds NaN or infinite values"
    return None


def _whole_tensor(value) -> torch.Tensor | None:
    """The tensor of a value that is as large as its weight. The host's nodes that only scale a
    weight have None there."""
    if isinstance(value, tuple) and (len(value) == 1 or value[0] in ("diff", "set")):
        return value[0] if len(value) == 1 else value[1][0]
    return None


def _describe(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def _adapter_shape(parts, target: Sequence[int] | None) -> tuple[int | None, int | None] | None:
    if isinstance(parts, LoRA):
        up, down = parts.up.flatten(1), parts.down.flatten(1)
        return (
            _product_shape(up, down)
            if parts.mid is None
            else _product_shape(up.t(), down, parts.mid)
        )
    if isinstance(parts, LoHa):
        first = _product_shape(parts.a1, parts.b1, parts.core1)
        return first if first == _product_shape(parts.a2, parts.b2, parts.core2) else None
    if isinstance(parts, LoKr):
        first, second = ((whole.shape[0],
                          whole.shape[1:].numel()) if whole is not None else _product_shape(
                              *factors)
                         for whole, factors in ((parts.w1, (parts.a1, parts.b1)),
                                                (parts.w2, (parts.a2, parts.b2, parts.core))))
        return first and second and (first[0] * second[0], first[1] * second[1])
    if isinstance(parts, GLoRA):
        return _glora_shape(parts, target)
    if isinstance(parts, OrthogonalAdapter):
        *_, blocks, rows, columns = (1, *parts.blocks.shape)
        return (blocks * rows, None) if rows == columns else None
    return None, None


def _glora_order(parts: GLoRA, target: Sequence[int] | None) -> tuple[int, bool]:
    """(rank, whether it is an older one), as the host tells. Where the factors allow both, the
    weight's shape decides; as long as that is not known, the rank is the smaller side."""
    a1, a2, b1, b2 = (factor.shape[:2] for factor in parts[:4])
    is_older, is_newer = a1[0] == a2[1] == b1[0] == b2[1], a1[1] == a2[0] == b1[1] == b2[0]
    if is_older and is_newer:
        is_older = a1[0] <= a2[0] if target is None else [*target[:2]] == [a2[0], a2[0]]
    return (a1[0], True) if is_older else (a2[0], False)


def _glora_shape(parts: GLoRA, target: Sequence[int] | None) -> tuple[int, int] | None:
    rank, is_older = _glora_order(parts, target)
    a1, a2, b1, b2 = (factor.flatten(1) for factor in parts[:4])
    of_weight, added = (_product_shape(*(pair[::-1] if is_older else pair))
                        for pair in ((a1, a2), (b1, b2)))
    if of_weight is None or added is None or of_weight[0] != of_weight[1]:
        return None
    # of which rank alpha is, the host cannot tell
    if parts.alpha is not None and b1.shape[0 if is_older else 1] != rank:
        return None
    channels = added[1] if is_older or target is None or len(target) < 3 else target[1]
    return added if of_weight[0] == channels or target is None else None


def _product_shape(a: torch.Tensor | None, b: torch.Tensor | None,
                   core: torch.Tensor | None = None) -> tuple[int, int] | None:
    """Flattened shape of `a @ b`, or of a Tucker product of core (i, j, ...), a (i, rows), b (j,
    columns)."""
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or (core is not None and core.ndim < 2):
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    return (
        (a.shape[1], b.shape[1] * core.shape[2:].numel())
        if core.shape[:2] == (a.shape[0], b.shape[0])
        else None
    )
