"""Dense products on a CPU, by oneDNN where it is faster than torch's own choice.

Torch multiplies float32 by MKL, which on CPUs of AMD runs at half of what they can.
"""
import functools

import torch

from .. import cpu_features, kernels


def takes(input: torch.Tensor) -> bool:
    """Returns whether `linear` multiplies an input: the same in every process on a machine."""
    return (
        input.device.type == "cpu"
        and input.dtype in _dtypes()
        and input.numel() > 0
        and not torch.compiler.is_compiling()
        and not kernels.is_off()
    )


@functools.cache
def _dtypes() -> frozenset[torch.dtype]:
    """Returns the dtypes that oneDNN multiplies faster here than what torch takes."""
    if not cpu_features.is_x86():
        return frozenset()
    faster = {torch.bfloat16: cpu_features.multiplies_bfloat16(),
              torch.float32: cpu_features.is_amd() and torch.backends.mkl.is_available()}
    return frozenset(dtype for dtype, is_faster in faster.items() if is_faster and _works(dtype))


def _works(dtype: torch.dtype) -> bool:
    """Returns whether this torch has oneDNN and the function, and the CPU what oneDNN asks for."""
    try:
        one = torch.ones(1, 1, dtype=dtype, device="cpu")
        linear(one, one)
        return True
    except (AttributeError, RuntimeError):
        return False


def linear(input: torch.Tensor, weight: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `torch.nn.functional.linear` of what `takes` accepts, without a gradient.

    Args:
        input: (M, K), contiguous.
        weight: (N, K), contiguous, in the dtype of `input`.
        bias: (N,) in the dtype of `input`, or None.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
