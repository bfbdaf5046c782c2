"""Packing values of any magnitude that float32 has: what a format can hold is as near as at
ordinary magnitudes, what it cannot becomes zeros at worst, and nothing becomes NaN. In torch and by
the kernels for CPUs."""
import functools

import pytest
import torch
from kernel_cases import one_of_each_search
from pack_api import FORMATS, FormatError, SecondMoments, pack_tensor, packed_tensor, packed_tensors
from packing_cases import GRIDS

from featherweight.ops.formats.base import powers_of_two
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.packing.method_choice import output_errors
from featherweight.ops.packing.pack_tensor import _has_reference

pytestmark = pytest.mark.usefixtures("one_thread", "by")

REFERENCES = [name for name, each in FORMATS.items() if _has_reference(each) and not each.arguments]
MAGNITUDES = [
    1e-45, 1e-42, 1e-40, 1e-38, 1e-36, 1e-30, 3e-24, 1e-22, 1e-20, 1e-15, 1e-10, 1e-8, 1e-6, 1e-3,
    1.0, 1e3, 1e5, 1e8, 1e13, 3e18, 1e20, 1e30, 1e36, 8e37, 3e38
]
WAYS = ["plain", "importance", "moments"]
each_searched = pytest.mark.parametrize("type_name", one_of_each_search(GRIDS))


def normal(rows: int = 4, columns: int = 512) -> torch.Tensor:
    """Rows whose largest magnitude is 1."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return values / values.abs().amax(1, keepdim=True)


@functools.cache
def moments() -> SecondMoments:
    moments, generator = SecondMoments.zeros(512, 256), torch.Generator().manual_seed(2)
    for hold_out in (False, True):
        moments.add(
            torch.randn(600, 512, generator=generator) * torch.linspace(0.1, 2, 512),
            hold_out=hold_out)
    return moments


def options(way: str) -> dict:
    given = {
        "plain": {}, "reference": {"reference": True}, "moments": {"moments": moments()},
        "importance": {
            "importance": torch.rand(512, generator=torch.Generator().manual_seed(3)) * 3
        }
    }
    return given[way]


def packed_values(values: torch.Tensor, type_name: str, way: str = "plain") -> torch.Tensor:
    return pack_tensor(values, FORMATS[type_name], **options(way)).dequantize()


def relative_errors(found: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of each row, float64; 0 where all of it is 0."""
    found, values = found.double(), values.double()
    norms = values.norm(dim=-1)
    return torch.where(norms > 0, (found - values).norm(dim=-1) / norms.clamp(min=1e-300),
                       found.norm(dim=-1))


def smallest(type_name: str) -> float:
    """The peak of a block from which on its scale has all of its bits, or of a float32 one enough
    of them."""
    packed_format = FORMATS[type_name]
    if packed_format.qparams:
        return 1e-41
    if packed_format.plain_dtype is not None or type_name == "MXFP4":
        return 1e4 * float(torch.finfo(packed_format.plain_dtype or torch.float32).smallest_normal)
    grid = packed_format.grid
    return 2.0**-14 * (
        max(abs(grid.levels[0]), grid.levels[-1]) * max(map(abs, grid.scales or (1,)))
        if grid
        else 1
    )


def largest(type_name: str) -> float:
    packed_format = FORMATS[type_name]
    if packed_format.plain_dtype is not None:
        return float(torch.finfo(packed_format.plain_dtype).max)
    return packed_format.grid.largest if packed_format.grid else packed_format.largest


def rows_of(size: float) -> torch.Tensor:
    """Rows of a magnitude: such as weights are, alike, one value among zeros, of one sign, and
    beside ordinary values."""
    one, beside, among, groups = torch.zeros(1, 512), normal(1), normal(1), normal(1)
    one[0, 300] = size
    beside[0, 7] = size
    among[0, ::3] *= size
    groups[0, 256:272] *= size
    return torch.cat([
        normal(1) * size,
        torch.full((1, 512), -size), one,
        normal(1).abs() * size,
        torch.zeros(1, 512), beside, among, groups
    ])


def errors_of_all_rows(type_name: str, way: str) -> torch.Tensor:
    """Of the rows of all magnitudes that a format does not refuse."""
    rows = torch.cat([rows_of(size) for size in MAGNITUDES])
    rows = rows[rows.abs().amax(1) <= largest(type_name)]
    found = packed_values(rows, type_name, way)
    assert found.isfinite().all()
    return relative_errors(found, rows)


def errors_by_magnitude(type_name: str, way: str) -> dict[float, float]:
    """Of weights of those magnitudes that the format holds, packed as one; and at 0.7, which all
    formats hold."""
    sizes = [
        0.7, *(size for size in MAGNITUDES if smallest(type_name) <= size <= largest(type_name))
    ]
    values = torch.cat([normal() * size for size in sizes])
    errors = relative_errors(packed_values(values, type_name, way), values)
    return dict(zip(sizes, errors.view(-1, len(normal())).mean(1).tolist(), strict=True))


def each_way(references):
    """Each type that is searched in each way, and some by the plain arithmetic of references."""
    return pytest.mark.parametrize(("type_name", "way"), [
        *(pytest.param(*each.values, way, marks=each.marks) for each in one_of_each_search(GRIDS)
          for way in WAYS), *((name, "reference") for name in references)])


@each_way(REFERENCES)
def test_no_row_becomes_nan_or_worse_than_zeros(type_name, way):
    errors = errors_of_all_rows(type_name, way)
    # otherwise columns of little importance may
    assert way != "plain" or (errors <= 1 + 1e-6).all()


@each_way([name for name in REFERENCES if name not in GRIDS])
def test_the_error_is_the_same_at_every_magnitude_that_the_format_holds(type_name, way):
    errors = errors_by_magnitude(type_name, way)
    # the scales of references are powers of two, or there are none
    assert max(errors.values()) < (1.5 if way == "reference" else 1.1) * errors[0.7], errors
    assert way == "reference" or len(errors) > (20 if FORMATS[type_name].qparams else 2)


@pytest.mark.parametrize("type_name", [name for name in GRIDS if largest(name) < 1e30])
def test_values_beyond_the_format_are_refused_in_a_sentence(type_name):
    for way in WAYS:
        for size in (1.1 * largest(type_name), 3e38):
            with pytest.raises(
                    FormatError,
                    match=f"The weight holds values up to .*; {type_name} holds .* at most."):
                packed_values(rows_of(size), type_name, way)
    assert packed_values(rows_of(largest(type_name)), type_name).isfinite().all()


@each_searched
@pytest.mark.parametrize("size", [1e-42, 1e-22])
def test_a_row_of_tiny_values_changes_no_bit_of_the_others(type_name, size):
    values = normal()
    values[1] *= size
    packed = packed_tensors(pack_tensor(values, FORMATS[type_name]))
    without = packed_tensors(pack_tensor(values[[0, 2, 3]], FORMATS[type_name]))
    for part, expected in zip(packed, without):
        assert torch.equal(part.view(4, -1)[[0, 2, 3]], expected.view(3, -1))


@pytest.mark.parametrize("type_name", ["NF4", "FP4"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exponent", [-110, -60, 60, 120])
def test_a_power_of_two_changes_no_code(type_name, way, exponent):
    codes, absmax = packed_tensors(pack_tensor(normal(), FORMATS[type_name], **options(way)))
    scaled, of_scaled = packed_tensors(
        pack_tensor(normal() * 2.0**exponent, FORMATS[type_name], **options(way)))
    assert torch.equal(scaled, codes) and torch.equal(of_scaled, absmax * 2.0**exponent)


@pytest.mark.parametrize("type_name", ["NF4", "FP4"])
@pytest.mark.parametrize(
    "size", [1e-38, 1e-36, 3e-24, 1e-20, 1e-10, 1.0, 1e13, 3e18, 1e20, 1e30, 3e38]
)
def test_values_are_kept_as_bitsandbytes_keeps_them(type_name, size):
    """One value of this magnitude among ordinary ones too, which it makes zeros there as well."""
    functional = pytest.importorskip("bitsandbytes").functional
    for values in (normal() * size, rows_of(size)[5:6], rows_of(-size)[6:7]):
        data, state = functional.quantize_4bit(values, blocksize=64, quant_type=type_name.lower())
        expected = relative_errors(functional.dequantize_4bit(data, state), values).max()
        assert (
            relative_errors(packed_values(values, type_name), values).max()
            <= 1.01 * expected + 1e-6
        )
        codes, absmax = packed_tensors(pack_tensor(values, FORMATS[type_name], reference=True))
        assert torch.equal(codes, data.view(-1)) and torch.equal(absmax, state.absmax)


# below, bitsandbytes divides by what is no number
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1.0, 1e20, 3e38])
def test_int8_of_bitsandbytes_is_read_at_any_magnitude(size):
    functional = pytest.importorskip("bitsandbytes").functional
    codes, peaks, _ = functional.int8_vectorwise_quant(normal() * size)
    packed = packed_tensor(INT8.of_columns(512),
                           codes.view(torch.uint8).view(-1), codes.shape, scale=peaks / 127)
    assert relative_errors(packed.dequantize(), normal() * size).max() < 0.02


@pytest.mark.parametrize("size", [1e-38, 1e-24, 1e-10, 1e-9, 1e9, 1e10, 1e19, 3e37])
def test_the_output_error_of_a_weight_does_not_depend_on_its_magnitude(size):
    packed, usual = ([pack_tensor(values, FORMATS[name]) for name in ("NF4", "FP4")]
                     for values in (normal() * size, normal()))
    expected = output_errors(normal(), usual, moments())
    assert output_errors(normal() * size, packed, moments()) == pytest.approx(expected, rel=0.02)


def test_powers_of_two_bring_every_number_near_one():
    peaks = torch.tensor(
        [0.0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 0.75, 1.0, 3.0, 1e30, 3.4028235e38])
    factor, unscale = powers_of_two(peaks)
    assert torch.equal(factor * unscale, torch.ones_like(peaks)) and torch.equal(
        peaks * factor * unscale, peaks
    )
    assert (
        ((peaks * factor)[3:] >= 1).all()
        and (peaks * factor < 4).all()
        and (peaks * factor)[1] >= 2.0**-23
    )
