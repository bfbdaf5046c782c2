"""The largest magnitude of a weight, which is refused where a value is not finite."""
import math

import torch

from ..formats.base import FormatError


def finite_peak(values: torch.Tensor) -> float:
    """Returns the largest magnitude of a weight's values.

    Raises:
        FormatError: A value is not finite.
    """
    lowest, highest = map(float, values.aminmax())
    peak = max(-lowest, highest)
    if not math.isfinite(peak) or math.isnan(lowest):
        raise FormatError("The weight holds NaN or infinite values.")
    return peak
