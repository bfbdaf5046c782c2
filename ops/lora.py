"""Patches on a packed weight: a low-rank branch beside the product, or arithmetic on the unpacked weight.

The host keeps, per weight, a list of patches `(strength, value, strength_model, offset, function)` that it would apply in
order. Packed bytes are never changed; one list becomes one `LayerPatches`:

- plain LoRAs after the last patch that is not a sum become a branch, `y += (x A^T) B^T`, A and B concatenated over all
  LoRAs of the layer along their ranks;
- everything else is applied to the unpacked weight each time the layer runs, by the host's own `calculate_weight`.
"""
import logging

import comfy.lora
import torch
from comfy.weight_adapter import (
    BOFTAdapter, GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter, WeightAdapterBase,
)

from . import product, rounding

log = logging.getLogger(__name__)

# The adapters that add to the weight, and where their tuple of weights holds the DoRA scale, with which they do not.
DORA_SCALE = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}
ANY = -1  # a number of rows or columns an adapter leaves open


class LayerPatches:
    """What one layer adds to its packed weight of logical shape (N, K).

    down: (R, K), the A factors of all branch LoRAs, or None. ups: B factors (n, r), strength and alpha folded in, one per
    slice of rows. slices: four numbers for each up: first and end row, first and end rank in `down`. weight_patches: the
    host's patches for the unpacked weight, in order. key: the weight's name in the model.
    """

    def __init__(self, key: str, down=None, ups=(), slices=(), weight_patches=(), original_weights=None):
        self.key = key
        self.down, self.ups, self.slices = down, list(ups), list(slices)
        self.weight_patches = list(weight_patches)
        self.original_weights = original_weights
        self.offloaded = False
        self.acts_on_rows = all(rows_of(patch, 0, 1) is not None for patch in self.weight_patches)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors: on the compute device, unless they are offloaded."""
        branch = [] if self.down is None else [self.down, *self.ups]
        adapters = [tensor for patch in self.weight_patches for tensor in adapter_tensors(patch[1])]
        return sum(tensor.nbytes for tensor in branch + adapters)

    def offload(self, device: torch.device):
        """Leave the compute device for good: from now on the factors travel there whenever the layer runs."""
        if self.down is not None:
            self.down, self.ups = self.down.to(device), [up.to(device) for up in self.ups]
        self.weight_patches = [(strength, _moved(value, device), *rest) for strength, value, *rest in self.weight_patches]
        self.offloaded = True

    def branch(self, input: torch.Tensor) -> tuple:
        """(down, ups, slices) in the dtype and on the device of the activations; cast once, not per step."""
        if self.down is not None and self.offloaded:
            return self.down.to(input), [up.to(input) for up in self.ups], self.slices
        if self.down is not None and (self.down.dtype != input.dtype or self.down.device != input.device):
            self.down, self.ups = self.down.to(input), [up.to(input) for up in self.ups]
        return self.down, self.ups, self.slices

    def patch_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """An unpacked weight with the host's patches applied in order. `weight` may be changed in place."""
        if not self.weight_patches:
            return weight
        return comfy.lora.calculate_weight(self.weight_patches, weight, self.key, original_weights=self.original_weights)

    def patch_rows(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """`patch_weight` of the weight's rows from `start` on; only where `acts_on_rows`."""
        patches = [rows_of(patch, start, start + len(rows)) for patch in self.weight_patches]
        return comfy.lora.calculate_weight(patches, rows, self.key)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """A dense weight with every patch in it, the branch too; the protocol of the host's weight functions."""
        merged = self.patch_weight(weight.to(torch.float32, copy=True))
        if self.down is not None:
            for row, row_end, up, rank, rank_end in product.each_slice(self.ups, self.slices):
                merged.flatten(1)[row:row_end].addmm_(up.to(merged), self.down[rank:rank_end].to(merged))
        return rounding.dithered(merged, weight.dtype)


def build_patches(key: str, patches: list, shape: torch.Size, device: torch.device, dtype: torch.dtype, branch: bool = True,
                  original_weights: dict | None = None) -> LayerPatches | None:
    """Turn the host's patch list of one packed weight into what its layer runs; None when nothing is left to do.

    shape: logical shape of the weight. device, dtype: of the branch's factors. branch: whether the layer has a branch
    (Linear and convolutions have). Patches that do not fit the weight are left out, with one warning.
    """
    patches = [patch for patch in patches if _fits(key, patch, shape)]
    cut = max((index + 1 for index, patch in enumerate(patches) if not is_sum(patch)), default=0)
    branch_patches, weight_patches = [], []
    for index, patch in enumerate(patches):
        strength, value, _, _, function = patch
        if not (branch and index >= cut and type(value) is LoRAAdapter and value.weights[3] is None and function is None):
            weight_patches.append((strength, _moved(value, device), *patch[2:]))
        elif strength != 0:
            branch_patches.append(patch)
    if not branch_patches and not weight_patches:
        return None
    return LayerPatches(key, *_branch(branch_patches, shape, device, dtype), weight_patches, original_weights)


def is_sum(patch: tuple) -> bool:
    """Whether a patch only adds to the weight something that does not depend on the weight."""
    _, value, strength_model, _, _ = patch
    if strength_model != 1.0:
        return False
    if isinstance(value, WeightAdapterBase):
        dora = DORA_SCALE.get(type(value))
        return dora is not None and value.weights[dora] is None
    if isinstance(value, list) or len(value) == 1:
        return True
    kind, data = value
    return kind == "diff" and not (len(data) > 1 and data[1]["pad_weight"])


def rows_of(patch: tuple, start: int, stop: int) -> tuple | None:
    """The part of a patch that concerns some rows of the weight; None for a patch that needs the whole weight at once."""
    strength, value, strength_model, offset, function = patch
    if offset is not None or function is not None:
        return None
    if type(value) is LoRAAdapter and value.weights[3:] == (None, None, None):
        part = LoRAAdapter(value.loaded_keys, (value.weights[0][start:stop], *value.weights[1:]))
    elif type(value) is LoHaAdapter and value.weights[5:] == (None, None, None):
        a1, b1, alpha, a2, b2 = value.weights[:5]
        part = LoHaAdapter(value.loaded_keys, (a1[start:stop], b1, alpha, a2[start:stop], b2, None, None, None))
    elif isinstance(value, tuple) and len(value) == 1:
        part = value if value[0] is None else (value[0][start:stop],)
    elif isinstance(value, tuple) and value[0] in ("diff", "set") and len(value[1]) == 1:
        part = (value[0], (value[1][0][start:stop],))
    else:
        return None
    return strength, part, strength_model, None, None


def _branch(patches: list, shape, device, dtype):
    """(down, ups, slices) of LoRA patches; LoRAs on the same rows, or on rows that overlap, share one up factor."""
    if not patches:
        return None, (), ()
    rows, columns = shape[0], shape[1:].numel()
    groups = {}
    for strength, adapter, _, offset, _ in patches:
        up, down, alpha = adapter.weights[:3]
        down = down.to(device, torch.float32).flatten(1)
        scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
        up = up.to(device, torch.float32).flatten(1) * scale
        row, row_end = 0, rows
        if offset is not None and offset[0] == 0:
            row, row_end = offset[1], offset[1] + offset[2]
        elif offset is not None:
            down = torch.nn.functional.pad(down, (offset[1], columns - offset[1] - offset[2]))
        downs, ups = groups.setdefault((row, row_end), ([], []))
        downs.append(down)
        ups.append(up)
    if _overlap(groups):  # added one after the other to what is rounded already, a weak LoRA would be lost
        downs = [down for downs, _ in groups.values() for down in downs]
        ups = [torch.nn.functional.pad(up, (0, 0, row, rows - row_end))
               for (row, row_end), (_, of_rows) in groups.items() for up in of_rows]
        groups = {(0, rows): (downs, ups)}
    slices, rank = [], 0
    for (row, row_end), (downs, _) in groups.items():
        ranks = sum(down.shape[0] for down in downs)
        slices += [row, row_end, rank, rank + ranks]
        rank += ranks
    down = torch.cat([down for downs, _ in groups.values() for down in downs]).to(dtype)
    return down, [torch.cat(ups, 1).to(dtype) for _, ups in groups.values()], slices


def _overlap(slices) -> bool:
    """Whether any of the slices (first row, end row) share a row."""
    slices = sorted(slices)
    return any(end > start for (_, end), (start, _) in zip(slices, slices[1:]))


def _fits(key: str, patch: tuple, shape: torch.Size) -> bool:
    """Whether a patch can be applied to a weight of `shape`; the host would log an error at every step instead."""
    reason = misfit(patch, shape)
    if reason is not None:
        log.warning("[Featherweight] A LoRA is left out of %s, which is %s: %s.", key, " x ".join(map(str, shape)), reason)
    return reason is None


def misfit(patch: tuple, shape: torch.Size) -> str | None:
    """Why one of the host's patches cannot be applied to a weight of `shape`, or None."""
    _, value, _, offset, _ = patch
    target = list(shape)
    if offset is not None:
        target[offset[0]] = offset[2]
    if isinstance(value, WeightAdapterBase):
        tensors = adapter_tensors(value)
        if not all(tensor.numel() for tensor in tensors):
            return "its rank is 0"
        target = [target[0], torch.Size(target[1:]).numel()]
        made_for = adapter_shape(value) if all(tensor.ndim > 1 for tensor in tensors) else None
        if made_for is None:
            return "its factors do not fit each other"
    elif isinstance(value, tuple) and (len(value) == 1 or value[0] in ("diff", "set")):
        tensors = value if len(value) == 1 else value[1][:1]
        if tensors[0] is None:  # the host's nodes that only scale a weight, by strength_model
            return None
        made_for = tensors[0].shape
    else:
        return None
    if len(made_for) != len(target) or any(made not in (wanted, ANY) for made, wanted in zip(made_for, target)):
        return f"it is made for a weight of {' x '.join(map(str, made_for))}"
    if not all(tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors):
        return "it holds NaN or infinite values"
    return None


def adapter_shape(adapter: WeightAdapterBase) -> tuple[int, int] | None:
    """(rows, columns) of the flattened weight an adapter is made for, where it says; None: its factors contradict.

    The host's `weight_adapter` has the meaning of the factors; it fails in the midst of a step when they do not fit.
    """
    weights = adapter.weights
    if isinstance(adapter, LoRAAdapter):
        up, down, mid = weights[0].flatten(1), weights[1].flatten(1), weights[3]
        return _product_shape(up, down) if mid is None else _product_shape(up.t(), down, mid)
    if isinstance(adapter, LoHaAdapter):
        a1, b1, _, a2, b2, core1, core2 = weights[:7]
        first, second = _product_shape(a1, b1, core1), _product_shape(a2, b2, core2)
        return first if first == second else None
    if isinstance(adapter, LoKrAdapter):
        w1, w2, _, a1, b1, a2, b2, core = weights[:8]
        first = _product_shape(a1, b1) if w1 is None else (w1.shape[0], w1.shape[1:].numel())
        second = _product_shape(a2, b2, core) if w2 is None else (w2.shape[0], w2.shape[1:].numel())
        return first and second and (first[0] * second[0], first[1] * second[1])
    if isinstance(adapter, GLoRAAdapter):  # two orders of the factors are in use; the rank is the smaller side
        b1, b2 = (factor.flatten(1) for factor in weights[2:4])
        return max(b1.shape[0], b2.shape[0]), max(b1.shape[1], b2.shape[1])
    if isinstance(adapter, (OFTAdapter, BOFTAdapter)):  # blocks along the rows: (..., blocks, size, size)
        return weights[0].shape[-3] * weights[0].shape[-2], ANY
    return ANY, ANY


def _product_shape(a: torch.Tensor | None, b: torch.Tensor | None, core: torch.Tensor | None = None) -> tuple[int, int] | None:
    """Flattened shape of `a @ b`, or of a Tucker product of core (i, j, ...), a (i, rows), b (j, columns)."""
    if a is None or b is None:
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    return (a.shape[1], b.shape[1] * core.shape[2:].numel()) if core.shape[:2] == (a.shape[0], b.shape[0]) else None


def _moved(value, device):
    """An adapter with its factors on `device`. Other patches may hold whole models and stay where they are."""
    if not isinstance(value, WeightAdapterBase):
        return value
    return type(value)(value.loaded_keys, _tensors_to(value.weights, device))


def _tensors_to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_tensors_to(item, device) for item in value)
    return value


def adapter_tensors(value) -> list[torch.Tensor]:
    """The factors of an adapter; none of other patches, which stay where they are."""
    if not isinstance(value, WeightAdapterBase):
        return []
    items = [item for part in value.weights for item in (part if isinstance(part, (tuple, list)) else (part,))]
    return [item for item in items if isinstance(item, torch.Tensor)]
