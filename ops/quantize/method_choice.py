"""The guard: of several ways to pack a weight the one is kept that serves the layer's output best,
judged by tokens that no way was fitted to."""
import torch

from ..format import powers_of_two
from ..packed_tensor import PackedTensor
from ..row_slicing import dense, take_rows
from .damped_hessian import DampedHessian, rows_at_a_time
from .second_moments import SecondMoments


def pick_lower_error(weight: torch.Tensor, candidates: list[PackedTensor],
                     moments: SecondMoments) -> PackedTensor:
    """The candidate with the least of `output_errors`, the first of equal ones."""
    errors = output_errors(weight, candidates, moments)
    return candidates[errors.index(min(errors))]


def output_errors(weight: torch.Tensor, candidates: list[PackedTensor],
                  moments: SecondMoments) -> list[float]:
    """Squared error of the layer's output by each candidate, as a part of the output's square, for
    the tokens held out.

    weight: any float dtype, (N, ...). candidates: packed from it, of its shape. For a pair, the
    output is that of the dense model's layer, and the candidates get the inputs of this one. Where
    no tokens are held out, the moments judge, damped as for packing; for a pair then less what no
    weight could make up for.
    """
    judge = _by_sketch if moments.held_out_count else _by_moments
    return judge(weight, candidates, moments)


def _slices(weight: torch.Tensor, candidates: list[PackedTensor]):
    """The weight and the candidates in slices of rows, float32 (n, K), times a power of two so that
    they can be squared."""
    columns = weight.shape[1:].numel()
    factor, _ = powers_of_two(torch.stack(weight.detach().aminmax()).float().abs().amax())
    for here in rows_at_a_time(len(weight), columns, weight.device):
        parts = (
            weight.detach()[here],
            *(dense(take_rows(candidate, here)) for candidate in candidates),
        )
        yield [part.reshape(-1, columns).float() * factor for part in parts]


def _by_sketch(weight, candidates, moments):
    sketch = moments.sketch.to(weight.device)
    of_dense = sketch if moments.dense_sketch is None else moments.dense_sketch.to(weight.device)
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for values, *packed in _slices(weight, candidates):
        wanted = values @ of_dense.T
        sums += torch.tensor([
            float(part.square().sum())
            for part in (wanted, *(wanted - value @ sketch.T for value in packed))
        ], dtype=sums.dtype)
    return _parts(sums)


def _by_moments(weight, candidates, moments):
    sums = torch.zeros(1 + len(candidates), dtype=torch.float64)
    for index, span in enumerate(moments.spans()):
        damped = DampedHessian(moments, index, weight.device)
        for values, *packed in _slices(weight, candidates):
            wanted = damped.target(values[:, span])
            sums += torch.tensor([
                float(((part @ damped.moments) * part).sum())
                for part in (wanted, *(wanted - value[:, span] for value in packed))
            ], dtype=sums.dtype)
    return _parts(sums)


def _parts(sums: torch.Tensor) -> list[float]:
    return (sums[1:] / sums[0] if sums[0] else sums[1:]).tolist()
