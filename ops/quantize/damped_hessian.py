"""Damps one block of second moments, and factors its inverse, for error feedback."""
import functools
from collections.abc import Iterator

import torch

from ..formats.base import Format, FormatError
from .second_moments import SecondMoments

# Added to the diagonal, as fractions of its mean, for inputs that were not measured. The second
# fraction is for few tokens; all of it is added if a block has at least as many columns as tokens.
DAMPING = 0.01, 0.02
# Q3_K is better with less: on the demo model by 0.3 to 0.5 dB in three sets of 64 held-out
# captions. Other types do not gain; mixes, where finer types hold what matters most, lose.
DAMPING_BY_FORMAT = {"Q3_K": (0.001, 0.03)}
# Limit for the temporaries of a slice of rows, which are five float32 matrices. On a CPU, fewer
# rows stay in the cache.
SLICE_BYTES = 160 << 20
CPU_ROWS = 2048


def damping_for(packed_format: Format) -> tuple[float, float]:
    """Returns the best damping for a format."""
    return DAMPING_BY_FORMAT.get(packed_format.name, DAMPING)


class DampedHessian:
    """One block of damped moments, of k columns, on a device.

    Args:
        moments: Of the layer's inputs.
        index: Of the block.
        device: Where to work.
        damping: See `DAMPING`.

    Attributes:
        moments: float32 (k, k); the mean of its diagonal was 1 before damping.
        triangle: float32 (k, k), the upper triangular U with U.T @ U = moments^-1.

    Raises:
        FormatError: The moments are not finite.
    """

    def __init__(self, moments: SecondMoments, index: int, device,
                 damping: tuple[float, float] = DAMPING):
        span = moments.spans()[index]
        width = span.stop - span.start
        block = moments.blocks[index, :width, :width].to(device, copy=True)
        if not block.isfinite().all():
            raise FormatError("The moments of the layer's inputs hold NaN or infinite values;"
                              " measure them again.")
        mean = block.diagonal().mean()
        if mean > 0:
            block /= mean
        else:
            block.zero_()  # all inputs were zero, so all columns count alike
        always, for_few_tokens = damping
        added = always + for_few_tokens * min(1, width / max(1, moments.count)) if mean > 0 else 1
        block.diagonal().add_(added)
        self.moments = block
        self.triangle = _triangle(block)

    @functools.cached_property
    def shares(self) -> torch.Tensor:
        """Row i, column j: how much of the error of column i column j compensates, (k, k)."""
        return self.triangle / -self.triangle.diagonal().unsqueeze(-1)

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """Weights of a column's squared error once all later columns have compensated it, (k,)."""
        return self.triangle.diagonal().square().reciprocal()

    @functools.cached_property
    def steps(self) -> torch.Tensor:
        """Row i, column j: the best change of column j for an error of column i, (k, k)."""
        return self.moments / -self.moments.diagonal()


def slice_rows(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yields slices of `rows` rows whose temporaries stay within `SLICE_BYTES`."""
    step = max(1, SLICE_BYTES // (5 * 4 * columns))
    step = min(step, CPU_ROWS) if device.type == "cpu" else step
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _triangle(moments: torch.Tensor) -> torch.Tensor:
    """Returns the upper triangular U with U.T @ U = moments^-1, float32 (k, k).

    U is the inverse of the upper triangular R with moments = R @ R.T, which is more exact than a
    factor of the inverse. If there is no factor in float32, float64 is tried; if there is none in
    float64 either, damping is added until there is.
    """
    added = 0.0
    device = moments.device if moments.device.type != "mps" else torch.device("cpu")  # for float64
    while True:
        for dtype in (torch.float32, torch.float64):
            flipped = moments.to(device, dtype).flip(0, 1)
            flipped.diagonal().add_(added)
            lower, failed = torch.linalg.cholesky_ex(flipped)
            if not failed:
                identity = torch.eye(len(lower), dtype=dtype, device=device)
                triangle = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                if triangle.isfinite().all():
                    return triangle.to(moments)
        added = max(10 * added, 1e-3 * float(moments.diagonal().mean()))
