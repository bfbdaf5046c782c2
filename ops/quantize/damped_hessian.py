"""Second moments as error feedback uses them: one block at a time, damped, with the factor of their
inverse."""
from collections.abc import Iterator

import torch

from ..format import Format, FormatError
from .second_moments import SecondMoments

# What is added to the diagonal, as parts of its mean: inputs will come that were not seen. The
# second part is for few tokens, and all of it is added where a block has as many columns as tokens
# or more.
DAMPING = 0.01, 0.02
# Less of it serves Q3_K better: on the demo model by 0.3 to 0.5 dB in three sets of 64 held-out
# captions. Other types it serves no better, and mixes of them, where finer ones hold what matters
# most, worse.
DAMPING_OF = {"Q3_K": (0.001, 0.03)}
# Temporaries of a slice of rows are five matrices of float32 within this many bytes. On a CPU fewer
# rows stay in its cache.
SLICE_BYTES = 160 << 20
CPU_ROWS = 2048


def damping_for(packed_format: type[Format], moments: SecondMoments) -> tuple[float, float]:
    """The parts that serve a format best. In a pair they also keep the target near the weight, for
    every format alike."""
    return DAMPING if moments.cross is not None else DAMPING_OF.get(packed_format.__name__, DAMPING)


class DampedHessian:
    """One block of moments, of k columns, on a device.

    moments: float32 (k, k), with 1 as the mean of the diagonal before damping. triangle: the upper
    triangular U with U.T @ U = moments^-1. change: for a pair, what `target` adds; see there.
    damping: see `DAMPING`. Raises FormatError for moments that are not finite.
    """

    def __init__(self, moments: SecondMoments, index: int, device, damping: tuple[float,
                                                                                  float] = DAMPING):
        span = moments.spans()[index]
        width = span.stop - span.start
        own, cross = (None if part is None else part[index, :width, :width].to(device, copy=True)
                      for part in (moments.blocks, moments.cross))
        if not all(bool(part.isfinite().all()) for part in (own, cross) if part is not None):
            raise FormatError(
                "The moments of the layer's inputs hold NaN or infinite values; measure them again."
            )
        mean = own.diagonal().mean()
        if mean > 0:
            own /= mean
        else:
            own.zero_()  # nothing ever came in, so all columns are alike
        self.change = None
        if cross is not None:
            self.change = cross.div_(mean).sub_(own) if mean > 0 else torch.zeros_like(own)
        always, for_few_tokens = damping
        own.diagonal().add_(always + for_few_tokens *
                            min(1, width / max(1, moments.count)) if mean > 0 else 1)
        self.moments, self.triangle = own, _triangle(own)
        if self.change is not None:
            self.change = self.change @ self.triangle.T @ self.triangle

    def target(self, values: torch.Tensor) -> torch.Tensor:
        """What to pack in place of these columns of a weight: themselves, and for a pair the
        corrected target.

        With H = sum of a' a'.T, C = sum of a a'.T over the tokens, inputs a of the dense model's
        layer and a' of this one, and c the damping: W + W (C - H) (H + cI)^-1, of least sum of |W a
        - V a'|^2 + c |V - W|^2. values: float32 (n, k).
        """
        return values if self.change is None else torch.addmm(values, values, self.change)


def rows_at_a_time(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of `rows` rows whose temporaries stay within bounds."""
    step = max(1, SLICE_BYTES // (5 * 4 * columns))
    step = min(step, CPU_ROWS) if device.type == "cpu" else step
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _triangle(moments: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with U.T @ U = moments^-1, float32 (k, k).

    With moments = R @ R.T, R upper triangular, it is the inverse of R: more exact than to factor
    the inverse. What has no factor in float32 is factored in float64; what has none there gets more
    damping, until it has.
    """
    more = 0.0
    # mps has no float64
    device = moments.device if moments.device.type != "mps" else torch.device("cpu")
    while True:
        for dtype in (torch.float32, torch.float64):
            turned = moments.to(device, dtype).flip(0, 1)
            turned.diagonal().add_(more)
            lower, failed = torch.linalg.cholesky_ex(turned)
            if not failed:
                one = torch.eye(len(lower), dtype=dtype, device=device)
                triangle = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
                if triangle.isfinite().all():
                    return triangle.to(moments)
        more = max(10 * more, 1e-3 * float(moments.diagonal().mean()))
