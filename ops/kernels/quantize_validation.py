"""Validates kernels that quantise against the torch reference, as `validation` does the others.

Their sums are rounded in another order, and where two choices are nearly equally good they may
choose the other one. So the remaining errors are compared, and what a kernel returns about its
choices is compared with what these stand for.
"""
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..formats.base import Fit, Format, Grid
from ..formats.row_layout import FAMILIES, RowFormat
from ..quantize.damped_hessian import DampedHessian
from ..quantize.grid_error_feedback import Columns, choose_columns, columns_at_a_time
from ..quantize.grid_search import Search
from ..quantize.row_columns import choose_codes, in_basis, target_of
from ..quantize.row_encoder import EncodedRows, RowEncoder
from ..quantize.second_moments import BLOCK, SecondMoments
from .kernel import WrongResult

SEVERAL_THREADS = 1 << 17  # values that keep several threads busy, and torch for 0.1 seconds
EFFORT = (9, 2, 2)  # tries, rounds and sweeps of the search
CANARY = 7.0  # surrounds the memory that a kernel may write
# How many times the reference's mean error is allowed. Rows whose columns are chosen one after
# another diverge from the first choice that differs.
BLOCK_TOLERANCE, EMPHASIS_TOLERANCE, ROW_TOLERANCE = 1.01, 1.05, 1.02
BEST_TOLERANCE = 1 + 1e-5  # of the error of a row, whose sums are rounded in another order
TOKENS = 512  # of which moments are


def _row_format(packed_format: Format) -> RowFormat:
    assert isinstance(packed_format, RowFormat)
    return packed_format


def _grid(packed_format: Format) -> Grid:
    assert packed_format.grid is not None  # kernels that quantise accept no other formats
    return packed_format.grid


def _block_cases(packed_format: Format) -> list[dict[str, int | bool]]:
    many = max(37, SEVERAL_THREADS // _grid(packed_format).length)
    return [
        {"blocks": 1, "weighted": False, "emphasis": False},
        {"blocks": 37, "weighted": False, "emphasis": True},
        {"blocks": 37, "weighted": True, "emphasis": True},
        {"blocks": many, "weighted": True, "emphasis": False},
    ]


def _row_cases(packed_format: Format) -> list[dict[str, int]]:
    grid = _grid(packed_format)
    columns = columns_at_a_time(grid)
    return [{"rows": 1, "columns": grid.length}, {"rows": 37, "columns": columns},
            {"rows": SEVERAL_THREADS // columns, "columns": columns}]


def _encoded_cases(packed_format: Format) -> list[dict[str, int]]:
    layout = _row_format(packed_format).layout
    columns = layout.columns
    has_tails = layout.scale.kind == "f32" and not layout.rotation
    return [{"rows": rows, "columns": width, "tries": tries} for rows, tries in
            ((1, 1), (1, 3), (37, 3), (SEVERAL_THREADS // columns, 11))
            for width in ((columns, columns + 1) if has_tails else (columns,))]


def _feedback_cases(packed_format: Format) -> list[dict[str, Any]]:
    layout = _row_format(packed_format).layout
    unit = layout.rotation or (37 if layout.scale.kind == "f32" else 2 * layout.group)
    columns = BLOCK + unit  # one block of moments, and a part of one
    return [{"rows": rows, "columns": columns, "block": block}
            for rows, block in ((1, None), (37, BLOCK), (SEVERAL_THREADS // BLOCK, BLOCK))]


CASES: dict[str, Callable[[Format], list]] = {
    "pack_blocks": _block_cases, "pack_columns": _row_cases, "pack_rows": _encoded_cases,
    "pack_row_columns": _feedback_cases,
}


def check_blocks(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                 device: torch.device, blocks: int, weighted: bool, emphasis: bool):
    """Checks "pack_blocks" in one case; see `validation.check`. weighted: whether errors have
    weights. emphasis: whether errors of large values count more."""
    grid, generator = _grid(packed_format), torch.Generator().manual_seed(blocks)
    values = _random_values(blocks, grid.length, -16, generator).to(device)
    if weighted:
        weights = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(device)
    else:
        weights = torch.ones_like(values)
    search_weights = weights if weighted else None
    padded = vars(Fit.empty(grid, blocks + 1, device))
    parts: dict[str, Any] = {name: None if part is None else part.fill_(CANARY)[:-1]
                             for name, part in padded.items()}
    result = Fit(**parts)
    run(packed_format, values, search_weights, result, *EFFORT, emphasis)
    if any(part is not None and (part[-1] != CANARY).any() for part in padded.values()):
        raise WrongResult("the kernel wrote outside its blocks")
    expected = Search(grid, device).fit(values, search_weights, *EFFORT, emphasis)
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
             EMPHASIS_TOLERANCE if emphasis else BLOCK_TOLERANCE)


def check_columns(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                  device: torch.device, rows: int, columns: int):
    """Checks "pack_columns" in one case; see `validation.check`.

    First with a search for the scales, then with the scales that the reference has chosen.
    """
    grid, generator = _grid(packed_format), torch.Generator().manual_seed(rows)
    search = Search(grid, device)
    values = _random_values(rows, columns, -6, generator).T.contiguous().to(device)
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
                torch.empty(columns + grid.length, rows, dtype=torch.float32, device=device))
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


def check_rows(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
               device: torch.device, rows: int, columns: int, tries: int):
    """Checks "pack_rows" in one case, with so many scales; see `validation.check`.

    Scales that are about equally good may differ, codes of the same scale may not.
    """
    generator = torch.Generator().manual_seed(rows)
    values = _random_values(rows, columns, -12, generator).to(device, dtype)
    # some hold all values of a group, some clip the largest
    shrinks = tuple(1 + (step - tries // 3) / 8 for step in reversed(range(tries)))
    encoder = _encoder(_row_format(packed_format), columns, shrinks, values, rows == 1)
    result, expected = _encoded(encoder, rows, device), _encoded(encoder, rows, device)
    _run_inside(result, lambda inside: run(encoder, values, inside))
    _run_inside(expected, lambda inside: encoder.encode(values, inside))
    if result.row_scale is not None and (result.row_scale != expected.row_scale).any():
        raise WrongResult("the scale of a row differs from the reference's")
    differs = (result.codes != expected.codes).view(*expected.scale.shape, -1).any(-1)
    if (differs & (result.scale == expected.scale)).any():
        raise WrongResult("codes differ from the reference's, of the same scale")
    errors = [(_values_of(encoder, encoded.rows(slice(rows))) - values.float())
              .double().square().sum(-1) for encoded in (result, expected)]
    if not (errors[0] <= BEST_TOLERANCE * errors[1]).all():
        raise WrongResult("the scales are worse than the reference's")


def check_row_columns(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                      device: torch.device, rows: int, columns: int, block: int | None):
    """Checks "pack_row_columns" in one case; see `validation.check`. block: columns of a block of
    moments, None for all."""
    generator = torch.Generator().manual_seed(rows)
    values = _random_values(rows, columns, -6, generator).to(device, dtype)
    encoder = _encoder(_row_format(packed_format), columns, (1, 0.875, 0.75, 1.25), values,
                       True)
    tokens = torch.randn((TOKENS, columns), generator=generator, dtype=torch.float32)
    tokens += tokens[:, :1]  # so that columns correlate
    moments = SecondMoments.zeros(columns, block, device)
    moments.add(tokens.to(device), hold_out=False)
    moments = in_basis(moments, encoder)
    losses = []
    for choose in (run, choose_codes):
        encoded = _encoded(encoder, rows, device)
        encoder.encode(values, encoded.rows(slice(rows)))
        loss, size = values.new_zeros((2, rows), dtype=torch.float64)
        for index, span in enumerate(moments.spans()):
            damped = DampedHessian(moments, index, device)
            _run_inside(encoded, lambda inside, span=span, damped=damped: choose(
                encoder, values, inside, span, damped))
            inside = encoded.rows(slice(rows))
            target = target_of(encoder, values, inside, span)
            chosen = encoder.basis(_values_of(encoder, inside)[:, span])
            if inside.row_scale is not None:
                chosen = chosen / inside.row_scale
            for total, part in ((loss, chosen - target), (size, target)):
                total += ((part @ damped.moments) * part).double().sum(-1)
        losses.append(loss / size.clamp(min=1e-30))
    _compare(losses[0], losses[1], ROW_TOLERANCE)


def _encoder(packed_format: RowFormat, columns: int, shrinks: tuple[float, ...],
             values: torch.Tensor, is_per_tensor: bool) -> RowEncoder:
    """Returns an encoder of rows of some columns; of values that may have one scale if
    `is_per_tensor`."""
    family = FAMILIES[packed_format.family]
    encoder = RowEncoder(family.of_columns(columns, *packed_format.sizes), shrinks)
    peak = float(values.abs().amax())
    if encoder.layout.row_scale:
        encoder.choose_scale_of_tensor(peak)
    elif is_per_tensor and encoder.layout.scale.kind == "f32":
        encoder.of_tensor = peak / encoder.largest
    return encoder


def _encoded(encoder: RowEncoder, rows: int, device: torch.device) -> EncodedRows:
    """Returns memory for some rows, and one more."""
    encoded = EncodedRows.empty(encoder.layout, rows + 1, device)
    for part in vars(encoded).values():
        if part is not None:
            part.fill_(CANARY)
    return encoded


def _values_of(encoder: RowEncoder, encoded: EncodedRows) -> torch.Tensor:
    """Returns the values of encoded rows by the reference, float32 (n, K)."""
    packed_format = encoder.format
    tensors = [encoded.codes, *(getattr(encoded, qparam.name) for qparam in packed_format.qparams)]
    out = torch.empty((len(encoded.codes), packed_format.block_length), dtype=torch.float32,
                      device=encoded.codes.device)
    return packed_format.dequantize_into([part.reshape(-1) for part in tensors], out)


def _run_inside(encoded: EncodedRows, write: Callable[[EncodedRows], None]):
    """Checks that `write` leaves the last row as it is."""
    write(encoded.rows(slice(len(encoded.codes) - 1)))
    if any((part[-1] != CANARY).any() for part in vars(encoded).values() if part is not None):
        raise WrongResult("the kernel wrote outside its rows")


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
