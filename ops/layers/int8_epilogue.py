"""Whether comfy_kitchen's int8 product adds LoRAs before it rounds.

Where its kernel has an epilogue for that it does. Elsewhere it adds to the rounded product, without
saying so, and most of a weak LoRA would be lost: so each shape is tried.
"""
import inspect
from collections.abc import Callable

import torch

LEAST_CAPABILITY = 8, 0  # with the epilogue
WEAK = 2.0 ** -12  # of the product: a sixteenth of a step of bfloat16
GAIN = 0.99, 1.01  # of what a weak change changes
TRIED_TOKENS = 256  # whose products are compared

_verdicts: dict[tuple, bool] = {}  # by device, dtype and shape: a model's pictures keep their bits


def adds_before_rounding(multiply: Callable[..., torch.Tensor], input: torch.Tensor, rows: int,
                         backend: str) -> bool:
    """Returns whether a product takes `residual`, and adds it before it rounds.

    Args:
        multiply: comfy_kitchen's `int8_linear` with a whole weight; it lacks `x` and `out_dtype`.
        input: (M, K).
        rows: N.
        backend: of comfy_kitchen.
    """
    dtype, device = input.dtype, input.device
    key = device, dtype, *input.shape, rows
    if key not in _verdicts:
        can = (backend == "cuda" and dtype.itemsize == 2 and not rows * dtype.itemsize % 16
               and "residual" in inspect.signature(multiply).parameters
               and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
               and not torch.cuda.is_current_stream_capturing())
        _verdicts[key] = can and _keeps_weak_changes(multiply, input, rows)
    return _verdicts[key]


def residual_arguments(change: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns arguments of `int8_linear` that add a change (M, N)."""
    ones = torch.ones(change.shape[1], dtype=change.dtype, device=change.device)
    return {"residual": change, "residual_scale": ones}


def _keeps_weak_changes(multiply: Callable[..., torch.Tensor], input: torch.Tensor,
                        rows: int) -> bool:
    """Tries a change of `WEAK`. Of some tokens the sums in float32 say what must come of it."""
    dtype = input.dtype
    try:
        sums = multiply(x=input[:TRIED_TOKENS], out_dtype=torch.float32)
        wave = torch.arange(rows, dtype=torch.float32, device=input.device).sin()
        row = (WEAK * sums.square().mean().sqrt() * wave).to(dtype)
        change = row.expand(len(input), rows).contiguous()
        out = multiply(x=input, out_dtype=dtype, **residual_arguments(change))[:TRIED_TOKENS]
    except torch.OutOfMemoryError:
        return False
    gained, expected = (((added.double() - sums.to(dtype)) * row).sum()
                        for added in (out, (sums + row).to(dtype)))
    gain = gained / expected
    return GAIN[0] <= gain.item() <= GAIN[1]  # not, where it is none
