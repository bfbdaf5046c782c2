"""Weights of torchao in safetensors against the package, and the bytes of few bits."""
import pytest
import torch
from conformance.base import read_weight
from conformance.torchao import of_integers
from oracles import installed
from pack_api import open_weights
from safetensors.torch import save_file


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_integers_are_packed(bits, tmp_path):
    written = of_integers(bits)
    packed = read_weight(tmp_path, written.parts, metadata=written.metadata)
    assert packed._qdata.nbytes == 96 * 128 * next(b for b in (2, 4, 8) if b >= bits) // 8


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int2", "int3"])
def test_values_are_those_of_the_package(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("torchao==0.18.0"))
    import torchao.quantization as torchao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    config = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}.get(
        name, lambda: torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, name),
                                                   granularity=torchao.PerGroup(32)))()
    model = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False, dtype=torch.bfloat16))
    torchao.quantize_(model, config)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    packed = open_weights(path).state_dict()["0.weight"]
    assert torch.equal(packed.dequantize().bfloat16(), model[0].weight.dequantize())
