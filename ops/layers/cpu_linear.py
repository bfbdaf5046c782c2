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
    try:
        one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        linear(one, one)
    except (AttributeError, RuntimeError):  # a torch without oneDNN or without this function
        return frozenset()
    dtypes = set()
    if cpu_features.multiplies_bfloat16():
        dtypes.add(torch.bfloat16)
    if cpu_features.is_amd() and torch.backends.mkl.is_available():
        dtypes.add(torch.float32)
    return frozenset(dtypes)


def linear(input: torch.Tensor, weight: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `torch.nn.functional.linear` of what `takes` accepts, without a gradient.

    Args:
        input: (M, K), contiguous.
        weight: (N, K), contiguous, in the dtype of `input`.
        bias: (N,) in the dtype of `input`, or None.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
