"""Weights of optimum-quanto against the package."""
import pytest
import torch
from conformance.base import read_weight
from oracles import installed


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
