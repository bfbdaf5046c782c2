"""Weights of torchao in safetensors, against small writers and against the package."""
import pytest
import torch
from oracles import installed
from quantizer_writers import torchao_bytes, torchao_header, torchao_integers
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.tensor.packed_layout import is_packed

INTEGERS = "IntxUnpackedToInt8Tensor"


def weight(rows=96, columns=128):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def target(bits):
    return {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}


def read(folder, parts, metadata):
    path = folder / "model.safetensors"
    save_file({f"L.{name}": value.contiguous() for name, value in parts.items()}, path, metadata)
    assert needs_own_reader(str(path))
    return open_weights(path).state_dict()


def read_weight(folder, parts, header):
    weights = read(folder, parts, {"L.weight": header, "tensor_names": '["L.weight"]'})
    assert set(weights) == {"L.weight"} and is_packed(weights["L.weight"])
    return weights["L.weight"]


@pytest.mark.parametrize(("dtype", "type_name"), [
    (torch.int8, "Int8Tensor"), (torch.float8_e4m3fn, "Float8Tensor"),
    (torch.float8_e5m2, "Float8Tensor")], ids=str)
def test_values_of_bytes(dtype, type_name, tmp_path):
    parts, expected = torchao_bytes(weight(), dtype)
    packed = read_weight(tmp_path, parts, torchao_header(type_name))
    assert torch.equal(packed.dequantize(), expected)
    assert packed.nbytes <= 1.05 * sum(value.nbytes for value in parts.values())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_of_integers_which_are_packed(bits, symmetric, dtype, tmp_path):
    parts, expected = torchao_integers(weight(), bits, symmetric=symmetric and bits > 1,
                                       dtype=dtype)
    packed = read_weight(tmp_path, parts, torchao_header(INTEGERS, **target(bits)))
    assert torch.equal(packed.dequantize(), expected)
    assert packed._qdata.nbytes == 96 * 128 * next(b for b in (2, 4, 8) if b >= bits) // 8


def test_zeros_of_int8_count(tmp_path):
    parts, expected = torchao_integers(weight(), 8, 128)
    packed = read_weight(tmp_path, parts, torchao_header("Int8Tensor"))
    assert torch.equal(packed.dequantize(), expected)


def test_codes_beyond_the_bits_of_the_header_keep_their_values(tmp_path):
    parts, expected = torchao_integers(weight(), 8, 128)
    packed = read_weight(tmp_path, parts, torchao_header(INTEGERS, **target(4)))
    assert torch.equal(packed.dequantize(), expected)


BAD = {
    "no header": (None, {}, "the header of its file does not say its type"),
    "no JSON": ("{", {}, "the header of its file does not say its type"),
    "tiles": (torchao_header("Int4TilePackedTo4dTensor"), {},
              "it is a 'Int4TilePackedTo4dTensor', expected Int8Tensor, Float8Tensor or Intx"),
    "scales of other rows": (torchao_header(INTEGERS), {"_weight_scale": torch.ones(7, 4)},
                             r"codes, float32 \(7, 4\) scales and int8 \(96, 4\) zeros, expected"),
    "zeros of floats": (torchao_header(INTEGERS), {"_weight_zero_point": torch.ones(96, 4)},
                        r"expected int8 \(N, K\) codes"),
    "codes of floats": (torchao_header(INTEGERS), {"_weight_qdata": torch.ones(96, 128)},
                        r"expected int8 \(N, K\) codes"),
    "rows of groups": (torchao_header("Float8Tensor"), {
        "_weight_qdata": torch.ones(96, 128).to(torch.float8_e4m3fn)},
        "expected int8 or fp8 with a scale for each row"),
    "zeros of fp8": (torchao_header("Int8Tensor"), {
        "_weight_zero_point": torch.zeros(96, 4).to(torch.float8_e4m3fn)},
        r"expected int8 \(N, K\) codes"),
}


@pytest.mark.parametrize("case", BAD)
def test_unknown_and_damaged_weights_are_a_sentence(case, tmp_path):
    header, other, message = BAD[case]
    parts = torchao_integers(weight())[0] | other
    with pytest.raises(WeightFileError,
                       match=f"model.safetensors: 'L', packed by torchao: .*{message}") as error:
        read(tmp_path, parts, {"L.weight": header} if header else None)
    assert "\n" not in str(error.value)


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
