"""Chooses between packings of a weight by the layer's output error for tokens held out."""
from collections.abc import Iterator

import torch

from ..formats.base import powers_of_two
from ..layers.product import values_of
from ..quantize.damped_hessian import DampedHessian, slice_rows
from ..quantize.row_source import RowSource
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_tensor import PackedTensor
from ..tensor.row_slicing import take_rows

# between them, squares of values and of their rounding errors are normal float32 numbers
SMALLEST, LARGEST = 2.0**-32, 2.0**32
SAMPLED_ROWS, PIECES = 1024, 16  # of a large weight, and pieces of it that they are in


def pick_lower_error(weight: torch.Tensor | RowSource, candidates: list[PackedTensor],
                     moments: SecondMoments) -> PackedTensor:
    """Returns the candidate with the least of `output_errors`, the first of equal ones.

    Of a large weight some rows tell it.
    """
    errors = output_errors(weight, candidates, moments, SAMPLED_ROWS)
    return candidates[errors.index(min(errors))]


def output_errors(weight: torch.Tensor | RowSource, candidates: list[PackedTensor],
                  moments: SecondMoments, most_rows: int | None = None) -> list[float]:
    """Returns each candidate's squared error of the layer's output over the output's square.

    It is measured for the tokens held out, or, if there are none, by the moments, damped as for
    packing.

    Args:
        weight: (N, ...) of any float dtype, or a source of its rows.
        candidates: Packed from the weight, in its shape.
        moments: Of the layer's inputs.
        most_rows: Measured ones, from all parts of the weight; None: all.
    """
    errors = _errors_by_sketch if moments.held_out_count else _errors_by_moments
    return errors(RowSource.of(weight), candidates, moments, most_rows)


def _row_slices(source: RowSource, candidates: list[PackedTensor],
                most_rows: int | None) -> Iterator[list[torch.Tensor]]:
    """Yields slices of rows of the weight and of each candidate, float32 (n, K).

    Where their squares could leave the range, all are multiplied by one power of two.
    """
    count, columns = source.shape[0], source.columns
    chosen = [*slice_rows(count, columns, source.device)]
    if most_rows is not None and count > most_rows:
        step = most_rows // PIECES
        chosen = [slice(start, start + step)
                  for start in range(0, count - step, (count - step) // PIECES)]

    def rows_of(row_slice: slice) -> torch.Tensor:
        return source.read(row_slice.start, row_slice.stop)

    largest = torch.stack([torch.stack(rows_of(row_slice).aminmax()) for row_slice in chosen]
                          ).float().abs().amax()
    factor = None if SMALLEST < float(largest) < LARGEST else powers_of_two(largest)[0]
    for row_slice in chosen:
        packed = [values_of(take_rows(candidate, row_slice)) for candidate in candidates]
        parts = [part.reshape(-1, columns).float() for part in (rows_of(row_slice), *packed)]
        yield parts if factor is None else [part * factor for part in parts]


def _errors_by_sketch(source: RowSource, candidates: list[PackedTensor],
                      moments: SecondMoments, most_rows: int | None) -> list[float]:
    sketch = moments.sketch.to(source.device)
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for values, *packed in _row_slices(source, candidates, most_rows):
        expected = values @ sketch.T
        sums += torch.tensor([
            float(part.square().sum())
            for part in (expected, *(expected - value @ sketch.T for value in packed))
        ], dtype=sums.dtype)
    return _relative(sums)


def _errors_by_moments(source: RowSource, candidates: list[PackedTensor],
                       moments: SecondMoments, most_rows: int | None) -> list[float]:
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for index, span in enumerate(moments.spans()):
        damped = DampedHessian(moments, index, source.device)
        for values, *packed in _row_slices(source, candidates, most_rows):
            expected = values[:, span]
            sums += torch.tensor([
                float(((part @ damped.moments) * part).sum())
                for part in (expected, *(expected - value[:, span] for value in packed))
            ], dtype=sums.dtype)
    return _relative(sums)


def _relative(sums: torch.Tensor) -> list[float]:
    """Returns the sums after the first, divided by it unless it is zero."""
    return (sums[1:] / sums[0] if sums[0] else sums[1:]).tolist()
