"""Adds what LoRAs change to a product that is rounded to 16 bits already, and loses none of it."""
import torch

from .. import kernels
from ..low_rank import LowRank
from ..stochastic_rounding import on_the_grid, pieces, stochastic_round


def add_branch(out: torch.Tensor, input: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Adds a low-rank branch to the product with the weight.

    Args:
        out: (..., N), the product; may be overwritten.
        input: (..., K), of the layer, in the dtype of `out`.
        low_rank: in the same dtype.

    Returns:
        The sum, of the shape and dtype of `out`.
    """
    input, flat = input.reshape(-1, input.shape[-1]), out.reshape(-1, out.shape[-1])
    if out.dtype.itemsize == 2 or flat.requires_grad or input.requires_grad:
        return add_small(out, low_rank.product(input, flat.shape[1]).view(out.shape))
    hidden = input @ low_rank.down.t()
    for part, up in low_rank.parts():
        flat[:, part.row:part.row_end].addmm_(hidden[:, part.rank:part.rank_end], up.t())
    return flat.view(out.shape)


def add_small(value: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Returns `value + change` in the dtype of `value`; keeps changes far below a step of it.

    Args:
        value: of any float dtype and shape; may be overwritten.
        change: of any float dtype and the shape of `value`.
    """
    if value.dtype.itemsize != 2:
        return value + change
    if value.requires_grad or change.requires_grad:
        return stochastic_round(value.float() + change, value.dtype)
    if (not torch.compiler.is_compiling() and value.dtype == change.dtype
            and value.is_contiguous() and change.is_contiguous()):
        run = kernels.find("add_rounded", value.device, None, value.dtype)
        if run is not None:
            run(value, change)
            return value
    for part, added in pieces(value, change):
        part.copy_(on_the_grid(part.float().add_(added), value.dtype))
    return value
