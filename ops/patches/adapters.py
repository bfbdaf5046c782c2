"""Reads the host's patches for one weight: their fields, shape, rank, and why one does not fit.

The value of a patch is an adapter of `comfy.weight_adapter`, whose tuple `weights` has no names, or
a tuple such as ("diff", (tensor,)). Where the factors of an adapter do not fit, the host fails
during a step, or logs an error at every step. Of an adapter of a type that is not known here, as
another pack's, nothing is assumed but that it changes a whole weight.
"""
import copy
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import comfy.lora
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
from torch.utils._pytree import tree_leaves, tree_map_only

OTHER_SIZE = "it is made for a weight of"  # starts what `shape_mismatch` says of sizes


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
    """OFT and BOFT, which rotate the rows.

    blocks: (..., blocks, size, size). limit: upper bound of the rotation's norm, if any.
    """
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
# These add to the weight something that does not depend on it, unless they have a DoRA scale.
SUMS = (LoRAAdapter, LoHaAdapter, LoKrAdapter)


def adapter_fields(
        adapter: WeightAdapterBase) -> LoRA | LoHa | LoKr | GLoRA | OrthogonalAdapter | None:
    """Returns the fields of an adapter by name; None for a type that is not known here."""
    for adapter_type, fields in ADAPTER_FIELDS.items():
        if isinstance(adapter, adapter_type):
            return fields(*adapter.weights[:len(fields._fields)])
    return None


def adapter_tensors(value) -> list[torch.Tensor]:
    """Returns the factors of an adapter; other patches, which stay where they are, have none."""
    weights = getattr(value, "weights", None) if isinstance(value, WeightAdapterBase) else None
    return [leaf for leaf in tree_leaves(weights) if isinstance(leaf, torch.Tensor)]


def to_device(value, device: torch.device):
    """Returns an adapter with its factors on `device`.

    Other patches are returned as they are, since they may hold whole models.
    """
    if not adapter_tensors(value):
        return value
    weights = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value.weights)
    return like(value, weights)


def like(adapter: WeightAdapterBase, weights) -> WeightAdapterBase:
    """Returns a copy of an adapter with other weights."""
    adapter = copy.copy(adapter)
    adapter.weights = weights
    return adapter


# --- what a patch does ---

def is_plain_lora(value) -> TypeGuard[LoRAAdapter]:
    """Returns whether a value can run as a low-rank branch, given that its patch `is_sum`."""
    if type(value) is not LoRAAdapter:
        return False
    fields = adapter_fields(value)
    return isinstance(fields, LoRA) and fields.mid is None


def lora_factors(adapter: LoRAAdapter) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns (up, down, scale by alpha) of a plain LoRA."""
    lora = adapter_fields(adapter)
    assert isinstance(lora, LoRA)
    return lora.up, lora.down, alpha_scale(lora.alpha, lora.down.shape[0])


def alpha_scale(alpha: float | None, rank: int) -> float:
    """Returns the factor that an adapter's alpha, if it has one, gives its product."""
    return 1.0 if alpha is None else alpha / rank


def is_sum(patch: tuple) -> bool:
    """Returns whether a patch only adds something that does not depend on the weight.

    Args:
        patch: (strength, value, strength_model, offset, function).
    """
    _, value, strength_model, _, _ = patch
    if strength_model != 1.0:
        return False
    if isinstance(value, WeightAdapterBase):
        fields = adapter_fields(value) if type(value) in SUMS else None
        return fields is not None and fields.dora_scale is None
    if isinstance(value, list) or len(value) == 1:
        return True
    patch_type, data = value
    return patch_type == "diff" and not (len(data) > 1 and data[1]["pad_weight"])


def slice_patch(patch: tuple, start: int, stop: int) -> tuple | None:
    """Returns the part of a patch for rows `start` to `stop` of the weight.

    None for a patch that needs the whole weight at once.
    """
    strength, value, strength_model, offset, function = patch
    if offset is not None or function is not None:
        return None
    fields = adapter_fields(value) if type(value) in SUMS else None
    if isinstance(fields, LoRA) and fields[3:] == (None, None, None):
        part = like(value, tuple(fields._replace(up=fields.up[start:stop])))
    elif isinstance(fields, LoHa) and fields[5:] == (None, None, None):
        part = like(value, tuple(fields._replace(a1=fields.a1[start:stop],
                                                  a2=fields.a2[start:stop])))
    elif isinstance(value, tuple) and len(value) == 1:
        part = value if value[0] is None else (value[0][start:stop],)
    elif isinstance(value, tuple) and value[0] in ("diff", "set") and len(value[1]) == 1:
        part = (value[0], (value[1][0][start:stop],))
    else:
        return None
    return strength, part, strength_model, None, None


def rank_of(value) -> int | None:
    """Returns the rank of the factors; None where the change has none."""
    fields = adapter_fields(value) if isinstance(value, WeightAdapterBase) else None
    if isinstance(fields, LoRA):
        return fields.down.shape[0]
    if isinstance(fields, LoHa):
        return fields.b1.shape[0]
    if isinstance(fields, LoKr):
        return next((factor.shape[0] for factor in (fields.b2, fields.b1) if factor is not None),
                    None)
    return _glora_order(fields, None)[0] if isinstance(fields, GLoRA) else None


# --- the shape it is made for ---

def shape_of(value, target: Sequence[int] | None = None) -> tuple[int | None, int | None] | None:
    """Returns (rows, columns) of the weight a value is made for, further dimensions flattened.

    Args:
        value: of a patch.
        target: shape of the weight to patch, where that is known; the host reads some GLoRAs in one
            of two ways, depending on it.

    Returns:
        None in place of a number that the value leaves open; None in place of both where its
        factors contradict each other.
    """
    if isinstance(value, WeightAdapterBase):
        fields = adapter_fields(value)
        if fields is not None and any(tensor.ndim < 2 for tensor in adapter_tensors(value)):
            return None
        return _adapter_shape(fields, target)
    tensor = _whole_tensor(value)
    if tensor is None:
        return None, None
    return tensor.shape[0] if tensor.shape else 1, tensor.shape[1:].numel()


def shape_mismatch(value, shape: Sequence[int],
                   offset: tuple[int, int, int] | None = None) -> str | None:
    """Returns why a value cannot be applied to a weight of `shape`; None where it can.

    Args:
        value: of a patch.
        shape: of the weight.
        offset: (dimension, start, length) of the part of the weight that the value is for.

    Returns:
        Part of a sentence, such as "its rank is 0".
    """
    target = list(shape)
    if offset is not None:
        dimension, start, length = offset
        size = target[dimension]
        if start + length > size:
            return f"it is made for rows {start} to {start + length}, the weight has {size}"
        target[dimension] = length
    if isinstance(value, WeightAdapterBase):
        if adapter_fields(value) is None:
            return None
        if not all(tensor.numel() for tensor in adapter_tensors(value)):
            return "its rank is 0"
        made_for = shape_of(value, target)
        target = [target[0] if target else 1, torch.Size(target[1:]).numel()]
        if made_for is None:
            return "its factors do not fit each other"
    else:
        tensor = _whole_tensor(value)
        if tensor is not None:
            made_for = tensor.shape
        elif isinstance(value, list):  # another model's weight and its patches
            made_for = comfy.lora.calculate_shape(value[1:], value[0][0], "")
        elif value[0] == "model_as_lora":
            made_for = value[1][0].shape
        else:
            return None
    if len(made_for) != len(target) or any(
        size not in (None, expected) for size, expected in zip(made_for, target)
    ):
        return f"{OTHER_SIZE} {_describe(made_for)}, not of {_describe(target)}"
    return None


def corruption(value) -> str | None:
    """Returns why a value cannot be applied to any weight, or None. Reads all of its tensors."""
    tensors = (
        adapter_tensors(value) if isinstance(value, WeightAdapterBase) else [_whole_tensor(value)]
    )
    if not all(
        tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors if tensor is not None
    ):
        return "it holds NaN or infinite values"
    return None


def _whole_tensor(value) -> torch.Tensor | None:
    """Returns the tensor of a value that is as large as its weight, or None.

    The host's nodes that only scale a weight have None in its place.
    """
    if not isinstance(value, tuple):
        return None
    if len(value) == 1:
        return value[0]
    return value[1][0] if value[0] in ("diff", "set") else None


def _describe(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def _adapter_shape(fields, target: Sequence[int] | None) -> tuple[int | None, int | None] | None:
    """Returns `shape_of` for the fields of an adapter."""
    if isinstance(fields, LoRA):
        up, down = fields.up.flatten(1), fields.down.flatten(1)
        if fields.mid is None:
            return _product_shape(up, down)
        return _product_shape(up.t(), down, fields.mid)
    if isinstance(fields, LoHa):
        first = _product_shape(fields.a1, fields.b1, fields.core1)
        return first if first == _product_shape(fields.a2, fields.b2, fields.core2) else None
    if isinstance(fields, LoKr):
        first = _factor_shape(fields.w1, fields.a1, fields.b1)
        second = _factor_shape(fields.w2, fields.a2, fields.b2, fields.core)
        return first and second and (first[0] * second[0], first[1] * second[1])
    if isinstance(fields, GLoRA):
        return _glora_shape(fields, target)
    if isinstance(fields, OrthogonalAdapter):
        *_, blocks, rows, columns = (1, *fields.blocks.shape)
        return (blocks * rows, None) if rows == columns else None
    return None, None


def _factor_shape(whole: torch.Tensor | None,
                  *factors: torch.Tensor | None) -> tuple[int, int] | None:
    """Returns the flattened shape of one factor of a LoKr, given whole or as a product."""
    if whole is None:
        return _product_shape(*factors)
    return whole.shape[0], whole.shape[1:].numel()


def _glora_order(fields: GLoRA, target: Sequence[int] | None) -> tuple[int, bool]:
    """Returns (rank, whether it has the older order of factors), as the host decides.

    Where the factors allow both orders, the shape of the weight decides; while that is not known,
    the rank is the smaller side.
    """
    a1, a2, b1, b2 = (factor.shape[:2] for factor in fields[:4])
    is_older = a1[0] == a2[1] == b1[0] == b2[1]
    is_newer = a1[1] == a2[0] == b1[1] == b2[0]
    if is_older and is_newer:
        is_older = a1[0] <= a2[0] if target is None else [*target[:2]] == [a2[0], a2[0]]
    return (a1[0], True) if is_older else (a2[0], False)


def _glora_shape(fields: GLoRA, target: Sequence[int] | None) -> tuple[int, int] | None:
    """Returns `shape_of` for a GLoRA."""
    rank, is_older = _glora_order(fields, target)
    a1, a2, b1, b2 = (factor.flatten(1) for factor in fields[:4])
    a = _product_shape(a2, a1) if is_older else _product_shape(a1, a2)
    b = _product_shape(b2, b1) if is_older else _product_shape(b1, b2)
    if a is None or b is None or a[0] != a[1]:
        return None
    # the host cannot tell which rank alpha belongs to
    if fields.alpha is not None and b1.shape[0 if is_older else 1] != rank:
        return None
    channels = b[1] if is_older or target is None or len(target) < 3 else target[1]
    return b if a[0] == channels or target is None else None


def _product_shape(a: torch.Tensor | None, b: torch.Tensor | None,
                   core: torch.Tensor | None = None) -> tuple[int, int] | None:
    """Returns the flattened shape of `a @ b`, or of a Tucker product; None where they do not fit.

    Args:
        a: (rows, r); with a core (i, rows).
        b: (r, columns); with a core (j, columns).
        core: (i, j, ...) or None.
    """
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    if core.ndim < 2 or core.shape[:2] != (a.shape[0], b.shape[0]):
        return None
    return a.shape[1], b.shape[1] * core.shape[2:].numel()
