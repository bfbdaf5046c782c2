"""Validates kernels that quantise against the torch reference, as `validation` does the others.

Their sums are rounded in another order, and where two choices are nearly equally good they may
choose the other one. So the remaining errors are compared, and what a kernel returns about its
choices is compared with what these stand for.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.base import Fit, Format, Grid
from ..quantize.grid_error_feedback import Columns, choose_columns, columns_at_a_time
from ..quantize.grid_search import Search
from .kernel import WrongResult

SEVERAL_THREADS = 1 << 17  # values that keep several threads busy, and torch for 0.1 seconds
EFFORT = (9, 2, 2)  # tries, rounds and sweeps of the search
CANARY = 7.0  # surrounds the memory that a kernel may write
# How many times the reference's mean error is allowed. Rows whose columns are chosen one after
# another diverge from the first choice that differs.
BLOCK_TOLERANCE, EMPHASIS_TOLERANCE, ROW_TOLERANCE = 1.01, 1.05, 1.02


@dataclass(frozen=True)
class Blocks:
    """A case of "pack_blocks".

    Attributes:
        blocks: Their number.
        weighted: Whether errors have weights.
        emphasis: Whether errors of large values count more.
    """
    blocks: int
    weighted: bool
    emphasis: bool


@dataclass(frozen=True)
class Rows:
    """A case of "pack_columns": the number of rows, and of columns."""
    rows: int
    columns: int


def _grid(packed_format: Format) -> Grid:
    assert packed_format.grid is not None  # kernels that quantise accept no other formats
    return packed_format.grid


def _block_cases(packed_format: Format) -> list[Blocks]:
    many = max(37, SEVERAL_THREADS // _grid(packed_format).length)
    return [
        Blocks(1, False, False),
        Blocks(37, False, True),
        Blocks(37, True, True),
        Blocks(many, True, False),
    ]


def _row_cases(packed_format: Format) -> list[Rows]:
    grid = _grid(packed_format)
    columns = columns_at_a_time(grid)
    return [Rows(1, grid.length), Rows(37, columns), Rows(SEVERAL_THREADS // columns, columns)]


CASES: dict[str, Callable[[Format], list]] = {
    "pack_blocks": _block_cases, "pack_columns": _row_cases
}


def check_blocks(run: Callable[..., None], case: Blocks, packed_format: Format,
                 dtype: torch.dtype, device: torch.device):
    """Checks "pack_blocks" in one case; see `validation.check`."""
    grid, generator = _grid(packed_format), torch.Generator().manual_seed(case.blocks)
    values = _random_values(case.blocks, grid.length, -16, generator).to(device)
    if case.weighted:
        weights = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(device)
    else:
        weights = torch.ones_like(values)
    search_weights = weights if case.weighted else None
    padded = vars(Fit.empty(grid, case.blocks + 1, device))
    parts: dict[str, Any] = {name: None if part is None else part.fill_(CANARY)[:-1]
                             for name, part in padded.items()}
    result = Fit(**parts)
    run(packed_format, values, search_weights, result, *EFFORT, case.emphasis)
    if any(part is not None and (part[-1] != CANARY).any() for part in padded.values()):
        raise WrongResult("the kernel wrote outside its blocks")
    expected = Search(grid, device).fit(values, search_weights, *EFFORT, case.emphasis)
    sizes = (weights * values.square()).sum(-1).clamp(min=1e-30)
    errors = []
    for fit in (result, expected):
        tensors = packed_format.encode(fit)
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        difference = packed_format.dequantize(*tensors).view(values.shape).double() - values
        errors.append((weights * difference.square()).sum(-1) / sizes)
    # These errors are without emphasis, so they may differ more where a search had it.
    kernel_error, reference_error = errors
    _compare(kernel_error, reference_error,
             EMPHASIS_TOLERANCE if case.emphasis else BLOCK_TOLERANCE)


def check_columns(run: Callable[..., None], case: Rows, packed_format: Format,
                  dtype: torch.dtype, device: torch.device):
    """Checks "pack_columns" in one case; see `validation.check`.

    First with a search for the scales, then with the scales that the reference has chosen.
    """
    grid, generator = _grid(packed_format), torch.Generator().manual_seed(case.rows)
    search, columns = Search(grid, device), case.columns
    values = _random_values(case.rows, columns, -6, generator).T.contiguous().to(device)
    shares = (torch.randn(columns, columns, generator=generator, dtype=torch.float32) /
              (4 * columns ** 0.5)).to(device)
    weights = (0.1 + torch.rand(columns, generator=generator, dtype=torch.float32)).to(device)
    choosers: tuple[Callable[..., object], ...]
    choosers = functools.partial(choose_columns, search), functools.partial(run, packed_format)
    start = Columns.like(grid, values)
    for inputs, search_weights in ((values, weights), (0.05 * values.roll(1, 0), None)):
        start_values = start.values()
        results, errors = [], []
        for choose in choosers:
            padded = Columns.like(
                grid,
                torch.empty(columns + grid.length, case.rows, dtype=torch.float32, device=device))
            for part, start_part in zip(padded.parts(), start.parts()):
                part.fill_(CANARY)[:len(start_part)] = start_part
            residuals = torch.cat([inputs, torch.full_like(inputs[:1], CANARY)])
            chosen = padded.part(0, columns)
            choose(residuals[:-1], shares, search_weights, chosen, *EFFORT[:2])
            if any((part[len(inside):] != CANARY).any() for part, inside in
                   zip((*padded.parts(), residuals), (*chosen.parts(), inputs))):
                raise WrongResult("the kernel wrote outside its columns")
            residuals = residuals[:-1]
            targets = inputs.double() + shares.double().triu(1).T @ residuals.double()
            if search_weights is None:
                targets += start_values
                expected = chosen.values().double() - start_values
            else:
                expected = targets - chosen.values()
            if not ((residuals - expected).abs() <= 1e-4 * targets.abs().amax(0)).all():  # NaN too
                raise WrongResult("the residuals do not match the codes")
            squares = (targets - chosen.values()).square()
            sizes = targets.square().mean(0).clamp(min=1e-30)
            errors.append((weights.unsqueeze(-1) * squares).mean(0) / sizes)
            results.append(chosen)
        reference_error, kernel_error = errors
        _compare(kernel_error, reference_error, ROW_TOLERANCE)
        start = results[0]


def _random_values(rows: int, columns: int, min_exponent: int,
                   generator: torch.Generator) -> torch.Tensor:
    """Returns float32 (rows, columns): rows of different magnitudes from 2**min_exponent on, some
    of equal values, of zeros or with one large value.

    The error of a row whose scales are near float16's smallest depends much on which of two
    neighbouring scales is chosen.
    """
    values = torch.randn((rows, columns), generator=generator, dtype=torch.float32)
    values *= 2.0 ** torch.randint(min_exponent, 6, (rows, 1), generator=generator)
    values[1::9] = 0
    values[2::9, ::3] = 0
    values[3::9] = values[3::9].abs()
    values[4::9] = -0.25
    values[5::9, 7] *= 100
    return values


def _compare(errors: torch.Tensor, reference_errors: torch.Tensor, tolerance: float):
    """Raises WrongResult where the mean error exceeds `tolerance` times the reference's."""
    mean, expected = errors.mean().item(), reference_errors.mean().item()
    if not mean <= tolerance * expected + 1e-9:
        raise WrongResult(f"the mean error of packed blocks is {mean:.3g}, that of the reference "
                          f"{expected:.3g}")
