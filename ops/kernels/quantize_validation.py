"""Kernels that pack against the torch reference, as `check` does for the others.

Their sums are rounded otherwise, and where two choices are nearly as good another one is made:
compared are the errors that are left, and what a kernel says of its own choices is compared with
what these stand for.
"""
import functools
from dataclasses import dataclass

import torch

from ..format import Fit, Format, Grid
from ..grid_columns import Columns, choose_columns, columns_at_a_time
from ..grid_search import Search
from .kernel import WrongResult

SEVERAL_THREADS = 1 << 17  # values that several threads pack, and torch in a tenth of a second
EFFORT = (9, 2, 2)  # tries, rounds and sweeps of the search
CANARY = 7.0  # stands beside what a kernel may write
# The mean error may be so many times the reference's. Rows whose columns are chosen one after
# another go ways of their own from the first choice on that is another.
WORSE, WORSE_ROWS = 1.01, 1.02


@dataclass(frozen=True)
class Blocks:
    """Blocks to pack, whether errors have weights, and whether those of large values count more."""
    blocks: int
    weighted: bool
    emphasis: bool


@dataclass(frozen=True)
class Rows:
    """Rows, and columns of each."""
    rows: int
    columns: int


def _blocks(grid: Grid) -> list[Blocks]:
    many = max(37, SEVERAL_THREADS // grid.length)
    return [
        Blocks(1, False, False),
        Blocks(37, False, True),
        Blocks(37, True, True),
        Blocks(many, True, False)
    ]


def _rows(grid: Grid) -> list[Rows]:
    columns = columns_at_a_time(grid)
    return [Rows(1, grid.length), Rows(37, columns), Rows(SEVERAL_THREADS // columns, columns)]


CASES = {"pack_blocks": _blocks, "pack_columns": _rows}


def check_blocks(run, case: Blocks, packed_format: type[Format], dtype, value_dtype, device):
    grid, generator = packed_format.grid, torch.Generator().manual_seed(case.blocks)
    values = _values(case.blocks, grid.length, -16, generator)
    weights = (
        torch.rand(values.shape, generator=generator, dtype=torch.float32)
        if case.weighted
        else torch.ones_like(values)
    )
    values, weights = values.to(device), weights.to(device)
    around = Fit.empty(grid, case.blocks + 1, device)
    found = Fit(*(None if part is None else part.fill_(CANARY)[:-1]
                  for part in vars(around).values()))
    run(packed_format, values, weights if case.weighted else None, found, *EFFORT, case.emphasis)
    if any(part is not None and (part[-1] != CANARY).any() for part in vars(around).values()):
        raise WrongResult("something was written beside the blocks")
    expected, errors = (
        Search(grid, device).fit(
            values, weights if case.weighted else None, *EFFORT, case.emphasis
        ),
        [],
    )
    for fit in (found, expected):
        parts = packed_format.encode(fit)
        parts = parts if isinstance(parts, tuple) else (parts,)
        off = packed_format.dequantize(*parts).view(values.shape).double() - values
        errors.append(
            (weights * off.square()).sum(-1) / (weights * values.square()).sum(-1).clamp(min=1e-30))
    _compare(errors, 1.05 if case.emphasis else WORSE)  # the error is that without emphasis


def check_columns(run, case: Rows, packed_format: type[Format], dtype, value_dtype, device):
    """Both ways: with a search of scales, and from what that has chosen."""
    grid, generator = packed_format.grid, torch.Generator().manual_seed(case.rows)
    search, columns = Search(grid, device), case.columns
    values = _values(case.rows, columns, -6, generator).T.contiguous().to(device)
    shares = (torch.randn(columns, columns, generator=generator, dtype=torch.float32) /
              (4 * columns ** 0.5)).to(device)
    weights = (0.1 + torch.rand(columns, generator=generator, dtype=torch.float32)).to(device)
    ways = functools.partial(choose_columns, search), functools.partial(run, packed_format)
    start = Columns.like(grid, values)
    for given, of_search in ((values, weights), (0.05 * values.roll(1, 0), None)):
        before, ends, errors = start.values(), [], []
        for choose in ways:
            around = Columns.like(
                grid,
                torch.empty(columns + grid.length, case.rows, dtype=torch.float32, device=device))
            for part, from_start in zip(around.parts(), start.parts()):
                part.fill_(CANARY)[:len(from_start)] = from_start
            handed = torch.cat([given, torch.full_like(given[:1], CANARY)])
            chosen = around.part(0, columns)
            choose(handed[:-1], shares, of_search, chosen, *EFFORT[:2])
            if any((part[len(inside):] != CANARY).any()
                   for part, inside in zip((*around.parts(), handed), (*chosen.parts(), given))):
                raise WrongResult("something was written beside the columns")
            wanted = given.double() + shares.double().triu(1).T @ handed[:-1].double()
            if of_search is None:
                wanted += before
            off, sizes = wanted - chosen.values(), wanted.square().mean(0).clamp(min=1e-30)
            says = off if of_search is not None else chosen.values().double() - before
            if not ((handed[:-1] - says).abs() <= 1e-4 * wanted.abs().amax(0)).all():  # NaN too
                raise WrongResult("what was handed on is not what the codes lack")
            errors.append((weights.unsqueeze(-1) * off.square()).mean(0) / sizes)
            ends.append(chosen)
        _compare(errors[::-1], WORSE_ROWS)
        start = ends[0]


def _values(rows: int, columns: int, smallest: int, generator: torch.Generator) -> torch.Tensor:
    """Float32 (rows, columns): rows of sizes from 2**smallest on, and some that are all alike or
    zero, or have one large value.

    Where scales are the smallest that float16 has, which of two is chosen makes much of a row's
    error.
    """
    values = torch.randn((rows, columns), generator=generator, dtype=torch.float32)
    values *= 2.0 ** torch.randint(smallest, 6, (rows, 1), generator=generator)
    values[1::9] = 0
    values[2::9, ::3], values[3::9], values[4::9] = 0, values[3::9].abs(), -0.25
    values[5::9, 7] *= 100
    return values


def _compare(errors: list[torch.Tensor], allowed: float):
    """errors: of the kernel, and of the reference."""
    mean, expected = (part.mean().item() for part in errors)
    if not mean <= allowed * expected + 1e-9:
        raise WrongResult(
            f"the mean error of packed blocks is {mean:.3g}, that of the reference {expected:.3g}")
