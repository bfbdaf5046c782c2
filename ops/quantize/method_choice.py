"""Chooses between packings of a weight by the layer's output error for tokens held out."""
from collections.abc import Iterator

import torch

from ..formats.base import powers_of_two
from ..layers.product import values_of
from ..tensor.packed_tensor import PackedTensor
from ..tensor.row_slicing import take_rows
from .damped_hessian import DampedHessian, slice_rows
from .row_source import RowSource
from .second_moments import SecondMoments

# between them, squares of values and of their rounding errors are normal float32 numbers
SMALLEST, LARGEST = 2.0**-32, 2.0**32


def pick_lower_error(weight: torch.Tensor | RowSource, candidates: list[PackedTensor],
                     moments: SecondMoments) -> PackedTensor:
    """Returns the candidate with the least of `output_errors`, the first of equal ones."""
    errors = output_errors(weight, candidates, moments)
    return candidates[errors.index(min(errors))]


def output_errors(weight: torch.Tensor | RowSource, candidates: list[PackedTensor],
                  moments: SecondMoments) -> list[float]:
    """Returns each candidate's squared error of the layer's output over the output's square.

    It is measured for the tokens held out, or, if there are none, by the moments, damped as for
    packing. For a pair, the output is that of the dense model's layer, and the candidates get the
    inputs of the packed one; by the moments, the part that no weight can correct does not count.

    Args:
        weight: (N, ...) of any float dtype, or a source of its rows.
        candidates: Packed from the weight, in its shape.
        moments: Of the layer's inputs.
    """
    errors = _errors_by_sketch if moments.held_out_count else _errors_by_moments
    return errors(RowSource.of(weight), candidates, moments)


def _row_slices(source: RowSource,
                candidates: list[PackedTensor]) -> Iterator[list[torch.Tensor]]:
    """Yields slices of rows of the weight and of each candidate, float32 (n, K).

    Where their squares could leave the range, all are multiplied by one power of two.
    """
    count, columns = source.shape[0], source.columns
    largest = torch.stack([torch.stack(rows.aminmax()) for _, rows in source.slices()]
                          ).float().abs().amax()
    factor = None if SMALLEST < float(largest) < LARGEST else powers_of_two(largest)[0]
    for row_slice in slice_rows(count, columns, source.device):
        packed = [values_of(take_rows(candidate, row_slice)) for candidate in candidates]
        rows = source.read(row_slice.start, row_slice.stop)
        parts = [part.reshape(-1, columns).float() for part in (rows, *packed)]
        yield parts if factor is None else [part * factor for part in parts]


def _errors_by_sketch(source: RowSource, candidates: list[PackedTensor],
                      moments: SecondMoments) -> list[float]:
    sketch = moments.sketch.to(source.device)
    dense_sketch = moments.dense_sketch
    dense_sketch = sketch if dense_sketch is None else dense_sketch.to(source.device)
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for values, *packed in _row_slices(source, candidates):
        expected = values @ dense_sketch.T
        sums += torch.tensor([
            float(part.square().sum())
            for part in (expected, *(expected - value @ sketch.T for value in packed))
        ], dtype=sums.dtype)
    return _relative(sums)


def _errors_by_moments(source: RowSource, candidates: list[PackedTensor],
                       moments: SecondMoments) -> list[float]:
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for index, span in enumerate(moments.spans()):
        damped = DampedHessian(moments, index, source.device)
        for values, *packed in _row_slices(source, candidates):
            expected = damped.target(values[:, span])
            sums += torch.tensor([
                float(((part @ damped.moments) * part).sum())
                for part in (expected, *(expected - value[:, span] for value in packed))
            ], dtype=sums.dtype)
    return _relative(sums)


def _relative(sums: torch.Tensor) -> list[float]:
    """Returns the sums after the first, divided by it unless it is zero."""
    return (sums[1:] / sums[0] if sums[0] else sums[1:]).tolist()
