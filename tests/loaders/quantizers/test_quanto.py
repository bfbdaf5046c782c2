"""Weights of optimum-quanto, against small writers and against the package."""
import pytest
import torch
from oracles import installed
from quantizer_writers import quanto_bits, quanto_bytes
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.tensor.packed_layout import is_packed

BYTES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def read(folder, parts):
    path = folder / "model.safetensors"
    save_file({f"L.{name}": value.contiguous() for name, value in parts.items()}, path)
    assert needs_own_reader(str(path))
    return open_weights(path).state_dict()


def read_weight(folder, parts):
    weights = read(folder, parts)
    assert set(weights) <= {"L.weight", "L.bias"} and is_packed(weights["L.weight"])
    return weights["L.weight"]


@pytest.mark.parametrize("shape", [(96, 128), (8, 4, 3, 3)])
@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_values_of_bytes(dtype, shape, tmp_path):
    parts, expected = quanto_bytes(weight(*shape), dtype)
    packed = read_weight(tmp_path, parts)
    assert packed.shape == shape and torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "group"), [((96, 256), 128), ((6, 64), 64), ((7, 96), 32),
                                              ((3, 96), 96)])
def test_values_of_bits(bits, dtype, shape, group, tmp_path):
    parts, expected = quanto_bits(weight(*shape), bits, group, dtype)
    packed = read_weight(tmp_path, parts | {"bias": torch.ones(shape[0])})
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes <= sum(value.nbytes for value in parts.values())


BAD = {
    "no bias": ({}, "it has no bias, without which .* qint8 and qfloat8 need none"),
    "a bias of other rows": ({"bias": torch.ones(7)}, "are no whole rows of the 7 that its bias"),
    "a bias of one number": ({"bias": torch.ones(())}, "are no whole rows of the 1 that its bias"),
    "shifts missing": ({"weight._shift": torch.ones(5).bfloat16()}, "expected uint8 codes with a"),
    "codes missing": ({"weight._data._data": torch.zeros(5, 128, dtype=torch.uint8)},
                      "expected 2 or 4 bits a value"),
    "a group of no whole bytes": ({"weight._data._data": torch.zeros(96, 129).to(torch.uint8)},
                                  "and whole bytes for each group"),
    "codes of floats": ({"weight._data._data": torch.zeros(5, 128)}, "expected uint8 codes"),
    "bytes of other rows": ({"weight._data": torch.zeros(9, 8, dtype=torch.int8)},
                            "expected int8 or fp8 with a scale for each row"),
    "bytes of an unknown type": ({"weight._data": torch.zeros(192, 8, dtype=torch.uint8)},
                                 "expected int8 or fp8"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_belong_together_are_a_sentence(case, tmp_path):
    other, message = BAD[case]
    parts = quanto_bits(weight(96, 256))[0] | other
    with pytest.raises(WeightFileError,
                       match=f"model.safetensors: 'L', packed by quanto: .*{message}") as error:
        read(tmp_path, parts)
    assert "\n" not in str(error.value)


def test_a_missing_part_is_named(tmp_path):
    parts = quanto_bits(weight(96, 256))[0]
    del parts["weight._scale"]
    with pytest.raises(WeightFileError, match="its weight._scale is missing"):
        read(tmp_path, parts)
    save_file({"L.weight._scale": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match="'L.weight._scale' is part of .*quanto whose"):
        open_weights(tmp_path / "a.safetensors").state_dict()


@pytest.mark.heavy
@pytest.mark.parametrize("type_name", ["qint8", "qint4", "qint2", "qfloat8", "qfloat8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_are_those_of_the_package(type_name, dtype, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("optimum-quanto==0.2.7"))
    quanto = pytest.importorskip("optimum.quanto")
    model = torch.nn.Sequential(torch.nn.Linear(256, 96, dtype=dtype))
    quanto.quantize(model, weights=getattr(quanto, type_name))
    quanto.freeze(model)
    stored = {name.removeprefix("0."): value for name, value in model.state_dict().items()}
    packed = read_weight(tmp_path, stored).dequantize()
    expected = model[0].weight.dequantize()
    # the package rounds the product to bfloat16 before it subtracts a shift
    is_rounded_twice = type_name in ("qint4", "qint2") and dtype == torch.bfloat16
    assert torch.allclose(packed.to(dtype), expected, rtol=0,
                          atol=expected.abs().max().item() / 128 if is_rounded_twice else 0)
