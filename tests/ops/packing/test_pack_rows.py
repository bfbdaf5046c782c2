"""Weights packed to ComfyUI's own formats, by torch and by kernels."""
import contextlib
import dataclasses
import random

from devtools.measure.weights import LAYOUTS

import comfy_kitchen.tensor  # noqa: F401  registers the layouts
import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from kernel_cases import Largest
from pack_api import ROW_TYPES, SecondMoments, pack_types, packed_tensors
from packing_cases import inputs, weight_of
from torch.utils.benchmark.utils.common import set_torch_threads

from featherweight.ops import kernels
from featherweight.ops.formats.base import TooLargeError
from featherweight.ops.packing import pack_rows
from featherweight.ops.quantize import damped_hessian, row_source
from featherweight.ops.quantize.row_encoder import RowEncoder
from featherweight.ops.quantize.row_source import RowSource

pytestmark = pytest.mark.usefixtures("one_thread", "by")
EACH_TYPE = pytest.mark.parametrize("name", ROW_TYPES)
BY_KERNEL = pytest.mark.parametrize("by", ["kernel"], indirect=True)


@contextlib.contextmanager
def by_torch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "find", lambda *case, **more: None)
        yield


def error(packed, weight):
    return float((packed.dequantize().double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(96, 512), (32, 1024)])
def test_a_plain_conversion_has_the_values_of_comfyuis(name, shape):
    layout, options = LAYOUTS[name]
    weight = weight_of(*shape)
    expected = QuantizedTensor.from_float(weight, layout, **options).dequantize()
    values = ROW_TYPES[name].pack(weight, is_plain=True).dequantize()
    different = (values - expected).abs() > 1e-6 * weight.abs().max()
    assert different.sum() <= weight.numel() / 100  # a sum of a rotation that lies at a tie


@EACH_TYPE
def test_searched_scales_are_never_worse(name):
    weight = weight_of()
    plain, searched = (ROW_TYPES[name].pack(weight, is_plain=is_plain)
                       for is_plain in (True, False))
    assert error(searched, weight) <= error(plain, weight)


def shapes_of(row_type, seed):
    """Random shapes that a type takes: odd numbers of rows, every rotation and none, tails."""
    draw = random.Random(f"{row_type.name} {seed}")
    units = (*pack_types.ROTATIONS, row_type.multiple, row_type.multiple * 3)
    shapes = [(draw.randrange(1, 40) * row_type.multiple, unit * draw.randrange(1, 1200 // unit))
              for unit in units]
    return [shape for shape in shapes if row_type.takes(shape)]


@BY_KERNEL
@EACH_TYPE
@pytest.mark.parametrize(("dtype", "is_plain"), [
    (torch.float32, True), (torch.bfloat16, False), *(
        pytest.param(dtype, is_plain, marks=pytest.mark.heavy) for dtype, is_plain in (
            (torch.float32, False), (torch.bfloat16, True), (torch.float16, True),
            (torch.float16, False)))], ids=str)
def test_weights_of_any_shape_are_packed_as_by_torch_on_any_number_of_threads(
        name, dtype, is_plain):
    for shape in shapes_of(ROW_TYPES[name], dtype):
        weight = weight_of(*shape, seed=shape[1]).to(dtype)
        with by_torch():
            expected = ROW_TYPES[name].pack(weight, is_plain=is_plain)
        for count in (1, 2):
            with set_torch_threads(count):
                packed = ROW_TYPES[name].pack(weight, is_plain=is_plain)
            if is_plain:
                for part, expected_part in zip(packed_tensors(packed), packed_tensors(expected)):
                    assert torch.equal(part, expected_part)
            assert error(packed, weight) <= error(expected, weight) * (1 + 1e-5)


@BY_KERNEL
@EACH_TYPE
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e20, 1e36])
def test_weights_of_any_magnitude_are_packed_as_by_torch(name, magnitude):
    weight = weight_of() * magnitude
    weight[5] = -magnitude
    weight[7, 1:] = 0
    packed = ROW_TYPES[name].pack(weight)
    with by_torch():
        expected = ROW_TYPES[name].pack(weight)
    values = packed.dequantize()
    assert values.isfinite().all()
    assert torch.allclose(values, expected.dequantize(), rtol=0.3, atol=0.05 * magnitude)
    if magnitude >= 1e-20:
        assert error(packed, weight) < 0.2


@EACH_TYPE
def test_a_value_whose_rotation_is_too_large_is_refused(name):
    weight = torch.full((32, 256), 0.9 * torch.finfo(torch.float32).max)
    if ROW_TYPES[name].rotates:
        with pytest.raises(TooLargeError, match=r"holds values up to 3.06254e\+38"):
            ROW_TYPES[name].pack(weight)
    else:
        assert ROW_TYPES[name].pack(weight).dequantize().isclose(weight, rtol=0.1).all()


@EACH_TYPE
@pytest.mark.parametrize("moments", [False, True], ids=["searched", "with feedback"])
def test_a_source_of_rows_is_packed_as_the_weight(name, moments, monkeypatch):
    monkeypatch.setattr(row_source, "READ_VALUES", 7 * 512)
    monkeypatch.setattr(damped_hessian, "SLICE_BYTES", 5 * 4 * 512 * 32)
    weight, given = weight_of(), None
    if moments:
        given = SecondMoments.zeros(512, 256)
        given.add(inputs(2048, 512))
    source = RowSource(tuple(weight.shape), lambda start, stop: weight[start:stop].clone(),
                       weight.device)
    expected = ROW_TYPES[name].pack(weight, given)
    for part, expected_part in zip(packed_tensors(ROW_TYPES[name].pack(source, given)),
                                   packed_tensors(expected)):
        assert torch.equal(part, expected_part)


@pytest.mark.parametrize(("name", "moments"), [
    *((name, False) for name in ROW_TYPES), ("int8_convrot", True), ("mxfp8", True),
    *(pytest.param(name, True, marks=pytest.mark.heavy)
      for name in ("float8_e4m3fn", "nvfp4", "asym_w4a8_int8"))])
def test_temporaries_are_those_of_a_slice_whatever_the_weight(name, moments, by, monkeypatch):
    monkeypatch.setattr(row_source, "READ_VALUES", 64 * 256)
    monkeypatch.setattr(damped_hessian, "SLICE_BYTES", 5 * 4 * 256 * 64)
    monkeypatch.setattr(pack_rows, "CPU_SLICE_VALUES", 64 * 256)
    given = None
    if moments:
        given = SecondMoments.zeros(256)
        given.add(inputs(2048, 256))
    weight = weight_of(320, 256).bfloat16()
    if by == "kernel":
        ROW_TYPES[name].pack(weight, given)  # checks it
    # but for bytes, as the packed weight has
    with Largest(lambda part: part.nbytes if part.dtype != torch.uint8 else 0) as largest:
        ROW_TYPES[name].pack(weight, given)
    assert largest.most <= (256 if moments else 64) * 256 * 4  # moments, or a slice in float32


@pytest.mark.parametrize(("name", "most"), [("asym_w4a8_int8", 0.01), ("convrot_w4a4", 0.05)])
def test_more_scales_than_are_tried_would_gain_nothing(name, most):
    weight = torch.randn(64, random.choice([256, 1024])) * torch.rand(64, 1).exp()
    every = dataclasses.replace(ROW_TYPES[name],
                                shrinks=tuple(share / 200 for share in range(90, 340)))
    errors = [(each.pack(weight).dequantize() - weight).square().sum()
              for each in (ROW_TYPES[name], every)]
    assert 0 <= 10 * torch.log10(errors[0] / errors[1]) + 1e-4 < most


@pytest.mark.parametrize("name", ["int8_convrot", "convrot_w4a4"])
def test_codes_of_integers_round_half_to_even_as_kernels_do(name):
    encoder = RowEncoder(ROW_TYPES[name].format_of((1, 256)), (1.0,))
    halves = torch.arange(-6, 6) + 0.5
    assert torch.equal(encoder.nearest(halves, torch.ones(1)), halves.round())
