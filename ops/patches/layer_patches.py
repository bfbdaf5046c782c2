"""Patches on a packed weight: a low-rank branch, or arithmetic on the dequantised weight.

The host keeps, per weight, a list of patches `(strength, value, strength_model, offset, function)`
that it would apply in order. Packed bytes are never changed; one list becomes one `LayerPatches`:

- plain LoRAs after the last patch that is not additive become a branch, `y += (x A^T) B^T`, A and B
  concatenated over all LoRAs of the layer along their ranks;
- everything else is applied to the dequantised weight each time the layer runs, by the host's own
  `calculate_weight`.
"""
from collections.abc import Iterable

import comfy.lora
import torch

from .. import stochastic_rounding
from ..lasting_memory import lasting_memory
from ..log import log
from ..low_rank import LowRank
from ..stable_names import stable_pickle_name
from .adapters import (
    adapter_tensors,
    corruption,
    is_plain_lora,
    is_sum,
    lora_factors,
    shape_mismatch,
    slice_patch,
    to_device,
)
from .patch_trial import trial_error


@stable_pickle_name
class LayerPatches:
    """The patches of one layer with a packed weight of logical shape (N, K).

    Args:
        key: the weight's key in the model.
        low_rank: the branch that sums all plain LoRAs, or None.
        weight_patches: the host's patches for the dequantised weight, in order.
        original_weights: see `comfy.lora.calculate_weight`.
    """

    def __init__(self, key: str, low_rank: LowRank | None = None,
                 weight_patches: Iterable[tuple] = (), original_weights: dict | None = None):
        self.key = key
        self.low_rank = low_rank
        self.weight_patches = list(weight_patches)
        self.original_weights = original_weights
        self.offloaded = False
        self.acts_on_rows = all(
            slice_patch(patch, 0, 1) is not None for patch in self.weight_patches)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, which are on the compute device unless `offloaded`."""
        adapters = sum(tensor.nbytes for patch in self.weight_patches
                       for tensor in adapter_tensors(patch[1]))
        return adapters + (0 if self.low_rank is None else self.low_rank.nbytes)

    def offload(self, device: torch.device):
        """Moves the factors to `device` for good; they are copied whenever the layer runs."""
        if self.low_rank is not None:
            self.low_rank = self.low_rank.to(device)
        self.weight_patches = [(strength, to_device(value, device), *rest)
                               for strength, value, *rest in self.weight_patches]
        self.offloaded = True

    def branch(self, input: torch.Tensor) -> LowRank | None:
        """Returns `low_rank` in the dtype and on the device of `input`; cast once, not per step."""
        low_rank = self.low_rank
        if low_rank is None:
            return None
        if self.offloaded:
            low_rank = low_rank.to(input)
        elif (low_rank.down.dtype, low_rank.down.device) != (input.dtype, input.device):
            with lasting_memory():
                self.low_rank = low_rank = low_rank.to(input)
        if input.requires_grad and torch.is_grad_enabled() and low_rank.down.is_inference():
            # torch saves no tensor of inference mode for a gradient
            low_rank = low_rank.clone()
        return low_rank

    def patch_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Applies the host's patches to a dequantised weight in order, perhaps in place."""
        if not self.weight_patches:
            return weight
        return comfy.lora.calculate_weight(self.weight_patches, weight, self.key,
                                           original_weights=self.original_weights)

    def patch_rows(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Applies `patch_weight` to rows of the weight from `start` on; needs `acts_on_rows`."""
        patches = [slice_patch(patch, start, start + len(rows)) for patch in self.weight_patches]
        return comfy.lora.calculate_weight(patches, rows, self.key)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a dense weight with every patch in it, the branch too.

        This is the protocol of the host's weight functions.
        """
        merged = self.patch_weight(weight.to(torch.float32, copy=True))
        if self.low_rank is not None:
            self.low_rank.add_to(merged)
        return stochastic_rounding.stochastic_round(merged, weight.dtype)


def build_patches(key: str, patches: list, shape: torch.Size, device: torch.device,
                  dtype: torch.dtype, branch: bool = True,
                  original_weights: dict | None = None) -> LayerPatches | None:
    """Turns the host's patches of one packed weight into a `LayerPatches`.

    Args:
        key: the weight's key in the model.
        patches: the host's patches, in order. Only `usable_patches` of them are used.
        shape: logical shape of the weight.
        device: of the branch's factors.
        dtype: of the branch's factors.
        branch: whether the layer can run a branch, as Linear and convolutions can.
        original_weights: see `comfy.lora.calculate_weight`.

    Returns:
        None where no patch changes anything.
    """
    branch_patches, weight_patches = divide(usable_patches(key, patches, shape), branch)
    weight_patches = [(strength, to_device(value, device), *rest)
                      for strength, value, *rest in weight_patches]
    if not branch_patches and not weight_patches:
        return None
    low_rank = _low_rank(branch_patches, shape, device, dtype) if branch_patches else None
    return LayerPatches(key, low_rank, weight_patches, original_weights)


def divide(patches: list, branch: bool = True) -> tuple[list, list]:
    """Divides the host's patches of one weight into those of the branch and those of the weight.

    Args:
        patches: in order.
        branch: whether the layer can run a branch.

    Returns:
        (plain LoRAs of a strength that is not zero, all patches that change the weight itself).
    """
    first_of_branch = max(
        (index + 1 for index, patch in enumerate(patches) if not is_sum(patch)), default=0)
    branch_patches, weight_patches = [], []
    for index, patch in enumerate(patches):
        strength, value, _, offset, function = patch
        dimension = 0 if offset is None else offset[0]
        runs_in_branch = (
            branch
            and index >= first_of_branch
            and dimension < 2  # further dimensions are those of a convolution's kernel
            and is_plain_lora(value)
            and function is None
        )
        if not runs_in_branch:
            weight_patches.append(patch)
        elif strength != 0:
            branch_patches.append(patch)
    return branch_patches, weight_patches


def usable_patches(key: str, patches: list, shape: torch.Size) -> list:
    """Returns the patches that fit a weight of `shape`; logs a warning for each of the others."""
    return [patch for patch in patches if _fits(key, patch, shape)]


def _low_rank(patches: list, shape: torch.Size, device: torch.device,
              dtype: torch.dtype) -> LowRank:
    """Sums plain LoRAs, each on the rows or columns that its patch names."""
    rows, columns, kernel = shape[0], shape[1:].numel(), shape[2:].numel()
    loras = []
    for strength, adapter, _, offset, _ in patches:
        up, down, scale = lora_factors(adapter)
        up, down = (factor.to(device, torch.float32).flatten(1) for factor in (up, down))
        row_range = 0, rows
        if offset is not None and offset[0] == 0:
            row_range = offset[1], offset[1] + offset[2]
        elif offset is not None:
            first, last = offset[1] * kernel, (offset[1] + offset[2]) * kernel
            down = torch.nn.functional.pad(down, (first, columns - last))
        loras.append((up * (strength * scale), down, row_range))
    return LowRank.from_factors(loras, rows, dtype)


def _fits(key: str, patch: tuple, shape: torch.Size) -> bool:
    """Returns whether a patch fits a weight of `shape`, and logs a warning if not.

    The host would log an error at every step instead.
    """
    _, value, _, offset, function = patch
    reason = (
        shape_mismatch(value, shape, offset)
        or corruption(value)
        or trial_error(value, shape, offset, function)
    )
    if reason is None:
        return True
    log.warning("A LoRA is left out of %s, which is %s: %s.", key,
                " x ".join(map(str, shape)), reason)
    return False
