"""Adapters that the host computes in another way than the programs that write them."""
from typing import Any

import torch
from comfy.weight_adapter import BOFTAdapter, OFTAdapter, WeightAdapterBase

from ..stable_names import stable_pickle_name
from .adapters import SUMS, OrthogonalAdapter, adapter_fields, shape_of


def as_trained(value):
    """Returns a value of a patch that has the effect its writer meant, if the host's has not."""
    fields = adapter_fields(value) if isinstance(value, WeightAdapterBase) else None
    scale = getattr(fields, "dora_scale", None)
    if isinstance(fields, OrthogonalAdapter) and scale is None:
        return (Oft if isinstance(value, OFTAdapter) else Boft)(value.loaded_keys, value.weights)
    if scale is not None and type(value) in ROW_DORAS and (shape := shape_of(value)) is not None:
        return row_dora(value, scale) if scale.shape[:1] == shape[:1] else value
    return value


def row_dora(adapter: WeightAdapterBase, norms: torch.Tensor) -> WeightAdapterBase:
    """Returns an adapter as a DoRA that gives each row of the weight a norm.

    Args:
        adapter: LoRA, LoHa or LoKr.
        norms: of the rows, in any shape.
    """
    fields = adapter_fields(adapter)
    assert fields is not None
    weights = tuple(fields._replace(dora_scale=norms.reshape(-1, 1)))
    return ROW_DORAS[type(adapter)](adapter.loaded_keys, weights)


class _RowDora(WeightAdapterBase):
    """Gives each row of the changed weight a norm of its own, `dora_scale` (rows, 1).

    PEFT (tuners/lora/dora.py) and LyCORIS (functional/general.py, weight_decompose) divide by the
    norm of each row of the changed weight, the host (comfy/weight_adapter/base.py) by that of the
    old one.
    """

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """Returns the weight, moved in place towards the trained one by `strength`."""
        fields = adapter_fields(self)
        assert fields is not None and fields.dora_scale is not None
        kind: Any = next(kind for kind in SUMS if isinstance(self, kind))
        plain = kind(self.loaded_keys, tuple(fields._replace(dora_scale=None)))
        change = plain.calculate_weight(torch.zeros_like(weight), key, 1.0, 1.0, None,
                                        lambda change: change, intermediate_dtype)
        norms = fields.dora_scale.to(weight.device, intermediate_dtype)
        rows = (weight + function(change)).flatten(1)
        rows *= function(norms) / rows.norm(dim=1, keepdim=True).clamp_min(
            torch.finfo(rows.dtype).tiny)
        weight += strength * (rows.reshape(weight.shape) - weight).to(weight.dtype)
        return weight


# host's adapter -> the same with DoRA of rows
ROW_DORAS: dict[type, Any] = {
    kind: stable_pickle_name(type(f"RowDora{kind.__name__}", (_RowDora, kind), {}))
    for kind in SUMS
}


class _Orthogonal(WeightAdapterBase):
    """Rotates the rows by Cayley transforms, then scales them.

    As LyCORIS (modules/diag_oft.py, modules/boft.py) and kohya (networks/oft.py): alpha is the
    bound of the rotation's norm divided by the rows. The host takes it for the bound itself, leaves
    OFT's `rescale` out, and squares the strength.
    """

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """Returns the weight, rotated in place by `strength` of the whole change."""
        fields = adapter_fields(self)
        assert isinstance(fields, OrthogonalAdapter)
        blocks = fields.blocks.to(weight.device, torch.float32)
        *_, count, size, _ = blocks.shape
        skew = blocks - blocks.mT
        if fields.limit and fields.limit > 0:
            bound = fields.limit * count * size
            skew = skew * (bound / (skew.norm() + 1e-8)).clamp_max(1)
        eye = torch.eye(size, device=weight.device, dtype=torch.float32)
        turn = (eye + skew) @ torch.linalg.inv(eye - skew)
        rows = self.turned(weight.to(intermediate_dtype),
                           (eye + strength * (turn - eye)).to(intermediate_dtype))
        if fields.rescale is not None:
            scale = fields.rescale.to(rows).reshape(-1, *[1] * (weight.ndim - 1))
            rows = rows * (1 + strength * (scale - 1))
        weight += function((rows - weight).to(weight.dtype))
        return weight

    def turned(self, weight: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Returns a weight (rows, ...) whose rows are rotated by `turn`."""
        raise NotImplementedError


@stable_pickle_name
class Oft(_Orthogonal, OFTAdapter):
    """Diag-OFT: one rotation for each block of rows."""

    def turned(self, weight, turn):
        """See `_Orthogonal`. turn: (blocks, size, size)."""
        rows = weight.unflatten(0, turn.shape[:2])
        return torch.einsum("bij,bi...->bj...", turn, rows).flatten(0, 1)


@stable_pickle_name
class Boft(_Orthogonal, BOFTAdapter):
    """BOFT: stages of rotations, each of rows that lie twice as far apart."""

    def turned(self, weight, turn):
        """See `_Orthogonal`. turn: (stages, blocks, size, size)."""
        _, count, size, _ = turn.shape
        for stage, rotation in enumerate(turn):
            order = torch.arange(len(weight), device=weight.device).reshape(
                -1, 2, 2**stage * size // 2).mT.flatten()
            rows = weight[order].unflatten(0, (count, size))
            weight = torch.empty_like(weight).index_copy(
                0, order, torch.einsum("bij,bj...->bi...", rotation, rows).flatten(0, 1))
        return weight
