"""Searches a format's grid with a device's kernel, or with torch if it has none."""
from collections.abc import Callable

import torch

from .. import kernels
from ..format import Fit, Format
from ..grid_search import Search

# See `Search.fit`. 1.5 times as much of each gains 0.03 dB and takes 1.5 times as long.
TRIES, ROUNDS, SWEEPS = 9, 1, 1


def kernel_for(packed_format: type[Format], device: torch.device) -> Callable[..., None] | None:
    """Returns the kernel that searches the blocks of a format, or None if torch has to."""
    return kernels.find("pack_blocks", device, packed_format, torch.float32)


def best_fit(packed_format: type[Format], values: torch.Tensor, weights: torch.Tensor | None = None,
             emphasis: bool = False, run: Callable[..., None] | None = None) -> Fit:
    """Runs `Search.fit` on blocks.

    Args:
        packed_format: A format with a grid.
        values: The blocks, float32 (n, block_length).
        weights: Of the squared errors, in the same shape; None: all equal.
        emphasis: See `Search.fit`.
        run: What `kernel_for` returned. A kernel rounds its sums differently, so some blocks
            differ from torch's; their errors are as small.
    """
    grid, device = packed_format.grid, values.device
    assert grid is not None, packed_format.__name__
    if run is None:
        return Search(grid, device).fit(values, weights, TRIES, ROUNDS, SWEEPS, emphasis)
    fit = Fit.empty(grid, len(values), device)
    run(packed_format, values.contiguous(), weights, fit, TRIES, ROUNDS, SWEEPS, emphasis)
    return fit
