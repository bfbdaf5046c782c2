"""Weights packed to ComfyUI's own formats."""
from devtools.measure.bench.host_types import LAYOUTS

import comfy_kitchen.tensor  # noqa: F401  registers the layouts
import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from featherweight.ops.formats.base import FormatError
from featherweight.ops.quantize import row_types
from featherweight.ops.quantize.row_types import ROW_TYPES, pack_to_type
from featherweight.ops.quantize.second_moments import SecondMoments

EACH_TYPE = pytest.mark.parametrize("name", ROW_TYPES)


def weight_of(rows=96, columns=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[:, columns // 3] *= 20
    return values * torch.rand(rows, 1, generator=generator) / 30


def error(packed, weight):
    return float((packed.dequantize().double() - weight.double()).norm() / weight.double().norm())


def inputs_of(columns, tokens=2048, seed=3):
    """Inputs whose columns correlate, as those of layers do."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, columns + 1) ** -0.7
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return torch.randn(tokens, columns, generator=generator) * spectrum @ basis


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(96, 512), (32, 1024), (160, 256)])
def test_a_plain_conversion_has_the_values_of_comfyuis(name, shape):
    layout, options = LAYOUTS[name]
    weight = weight_of(*shape)
    expected = QuantizedTensor.from_float(weight, layout, **options).dequantize()
    values = pack_to_type(weight, ROW_TYPES[name], is_plain=True).dequantize()
    different = (values - expected).abs() > 1e-6 * weight.abs().max()
    assert different.sum() <= weight.numel() / 100  # a sum of a rotation that lies at a tie


@EACH_TYPE
@pytest.mark.parametrize("seed", range(5))
def test_searched_scales_are_never_worse(name, seed):
    weight = weight_of(seed=seed)
    plain, searched = (pack_to_type(weight, ROW_TYPES[name], is_plain=is_plain)
                       for is_plain in (True, False))
    assert error(searched, weight) <= error(plain, weight)


@EACH_TYPE
def test_a_weight_by_its_rows_is_the_same(name, monkeypatch):
    weight = weight_of(rows=160)
    whole = pack_to_type(weight, ROW_TYPES[name]).dequantize()
    monkeypatch.setattr(row_types, "CPU_SLICE_VALUES", 7 * 512)
    assert torch.equal(pack_to_type(weight, ROW_TYPES[name]).dequantize(), whole)


@EACH_TYPE
def test_feedback_gives_a_smaller_error_of_the_output(name):
    weight, inputs = weight_of(), inputs_of(512)
    moments = SecondMoments.zeros(512)
    for part in inputs[:1536].split(128):
        moments.add(part)
    tokens = inputs[1536:].double()
    exact = tokens @ weight.double().T

    def loss(packed):
        return float((tokens @ packed.dequantize().double().T - exact).norm() / exact.norm())

    searched, fed_back = (loss(pack_to_type(weight, ROW_TYPES[name], given))
                          for given in (None, moments))
    assert fed_back < searched


@EACH_TYPE
def test_zeros_stay_zeros(name):
    weight = weight_of()
    weight[3] = 0
    weight[:, :256] = 0
    values = pack_to_type(weight, ROW_TYPES[name]).dequantize()
    assert not values[3].any() and not values[:, :256].any()
    assert not pack_to_type(torch.zeros(96, 512), ROW_TYPES[name]).dequantize().any()


@EACH_TYPE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused(name, bad):
    weight = weight_of()
    weight[2, 2] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        pack_to_type(weight, ROW_TYPES[name])


@EACH_TYPE
def test_a_shape_that_does_not_fit_is_refused(name):
    with pytest.raises(FormatError, match=r"does not hold a weight of shape \(3, 4, 5\)"):
        pack_to_type(torch.zeros(3, 4, 5), ROW_TYPES[name])
