"""What ComfyUI's own types lose, packed here and by ComfyUI's own quantising."""
import json
from types import SimpleNamespace

from devtools.measure import host_type_packing, packing_quality
from devtools.measure.weights import LAYOUTS, snr

import packing_error
import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from pack_api import ROW_TYPES

from devtools import ROOT

TABLES = json.loads((ROOT / "demo_model" / "quality.json").read_text(encoding="utf-8"))
RECORDED, EQUAL_BYTES = TABLES["host_types"], TABLES["equal_bytes"]
# type -> dB that a measurement gains over comfy_kitchen, and with inputs as ComfyUI's kernels have
# them
GAINS = {"int8_convrot": (7, 2.3), "float8_e4m3fn": (5.5, 2.5), "mxfp8": (4, 1.8),
         "nvfp4": (7, 3), "asym_w4a8_int8": (7, 7)}
# of an error: sums of a rotation that lie at a tie are rounded either way
TIES = 1e-5


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of every kind of distribution: of rows and columns of unequal size, with heavy tails,
    with few values, with two."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for rows, columns in ((64, 512), (160, 1024), (96, 768)):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        values = normal(rows, columns)
        kinds = (
            values, values * normal(rows, 1).exp(), values * (1.5 * normal(1, columns)).exp(),
            values / torch.rand(rows, columns, generator=generator).clamp(min=0.02), values**3,
            torch.rand(rows, columns, generator=generator) - 0.5, values.sign(),
            values * (torch.rand(rows, columns, generator=generator) < 0.05))
        weights |= {f"{rows}.{number}.weight": 0.02 * kind for number, kind in enumerate(kinds)}
    large, sizes = (torch.randn(1536, width, generator=generator) for width in (2048, 1))
    return weights | {"large.weight": large * (0.5 * sizes).exp()}


@pytest.mark.parametrize("kind", [
    name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.heavy) for name in ROW_TYPES])
def test_without_a_measurement_no_weight_is_worse_than_by_comfy_kitchen(kind, tmp_path):
    weights = packing_error.demo_weights()
    weights = {name: weights[name] for name in packing_error.block_matrices(weights)}
    weights |= random_weights()
    for name, packed in host_type_packing.by_kitchen(weights, kind, tmp_path).items():
        own = ROW_TYPES[kind].pack(weights[name]).dequantize()
        errors = [float((values.double() - weights[name].double()).norm())
                  for values in (own, packed.dequantize())]
        assert errors[0] <= (1 + TIES) * errors[1], name


@pytest.mark.parametrize("kind", ["int8_convrot", "float8_e4m3fn"])  # multiplied on a CPU too
def test_inputs_are_rounded_as_comfyuis_kernels_round_them(kind, tmp_path):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 512, generator=generator) / 30
    inputs = torch.randn(48, 512, generator=generator)
    layout, options = LAYOUTS[kind]
    of_kitchen = QuantizedTensor.from_float(weight, layout, **options)
    given = inputs if kind == "int8_convrot" else QuantizedTensor.from_float(inputs, layout)
    expected = torch.nn.functional.linear(given, of_kitchen)
    layer = torch.nn.Linear(512, 64, bias=False)
    packed = host_type_packing.by_kitchen({"weight": weight}, kind, tmp_path)["weight"]
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Sequential(layer)))
    exact = layer(inputs)
    with host_type_packing.quantised_inputs(model, kind):
        rounded = layer(inputs)
    assert snr(rounded, expected) > 80 and snr(exact, expected) < 50
    assert torch.equal(layer(inputs), exact)


def test_the_recorded_table_has_the_gains_of_a_measurement():
    rows = {(row["way"], row["size"]): row for row in RECORDED["rows"]}
    for kind, gains in GAINS.items():
        check_gains(rows["kitchen", kind], rows["measured", kind], gains)


def test_the_docs_have_the_recorded_table():
    page = (ROOT / "docs" / "packing.md").read_text(encoding="utf-8")
    assert packing_quality.host_summary(RECORDED) in page
    assert packing_quality.equal_summary(EQUAL_BYTES) in page


def test_a_measured_mix_is_better_than_what_people_share_at_its_bytes():
    assert [(row["way"], row["size"]) for row in EQUAL_BYTES["rows"]] == (
        packing_quality.equal_rows())
    rows = iter(EQUAL_BYTES["rows"])
    for published, plain, measured in zip(rows, rows, rows, strict=True):
        assert max(plain["bytes"], measured["bytes"]) <= published["bytes"]
        assert measured["snr"] > max(plain["snr"], published["snr"]) + 6
        assert abs(plain["snr"] - published["snr"]) < 1


@pytest.mark.heavy
@pytest.mark.parametrize("kind", GAINS)
def test_a_measurement_gains_over_comfy_kitchen(kind):
    kitchen, measured = packing_quality.measure_packing(64, [("kitchen", kind), ("measured", kind)])
    check_gains(kitchen, measured, GAINS[kind])


def check_gains(kitchen: dict, measured: dict, gains: tuple[float, float]):
    for name, gain in zip(("snr", "snr_of_kernels"), gains):
        assert measured[name] >= kitchen[name] + gain, (measured, kitchen)
