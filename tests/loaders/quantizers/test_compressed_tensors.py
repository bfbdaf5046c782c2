"""Weights of compressed-tensors, against small writers and against the package."""
import pytest
import torch
from oracles import installed
from quantizer_writers import int_quantized, nvfp4, pack_quantized, quantize
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.tensor.packed_layout import is_packed


def weight(rows=96, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def read(folder, parts):
    path = folder / "model.safetensors"
    save_file({f"L.{name}": value.contiguous() for name, value in parts.items()}, path)
    assert needs_own_reader(str(path))
    return open_weights(path).state_dict()


def read_weight(folder, parts):
    weights = read(folder, parts)
    assert set(weights) == {"L.weight"} and is_packed(weights["L.weight"])
    return weights["L.weight"]


def held(packed, parts):
    return packed.nbytes / sum(value.nbytes for value in parts.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, None])
def test_values_of_pack_quantized(bits, symmetric, group, tmp_path):
    parts, expected = pack_quantized(weight(), bits, group, symmetric)
    packed = read_weight(tmp_path, parts)
    assert torch.equal(packed.dequantize(), expected)
    assert held(packed, parts) <= 1.05


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [90, 40])
def test_rows_may_end_within_a_word(rows, bits, tmp_path):
    parts, expected = pack_quantized(weight(rows, 136), bits, 8, symmetric=False)
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_of_a_group_may_lie_apart(symmetric, tmp_path):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    parts, expected = pack_quantized(weight(), symmetric=symmetric, order=order)
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)
    parts, expected = pack_quantized(weight(), symmetric=symmetric)
    parts["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)


def test_one_scale_and_zeros_in_bytes(tmp_path):
    parts, expected = pack_quantized(weight(1, 128), group=None, symmetric=False)
    zero = int(parts["weight_zero_point"]) & 15
    parts["weight_zero_point"] = torch.tensor([[zero - 8]], dtype=torch.int8)
    parts["weight_scale"] = parts["weight_scale"].view(1)
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, None])
def test_values_of_int_quantized(symmetric, group, tmp_path):
    parts, expected = int_quantized(weight(), group, symmetric)
    packed = read_weight(tmp_path, parts)
    assert torch.equal(packed.dequantize(), expected) and held(packed, parts) <= 1.05


def test_values_of_nvfp4(tmp_path):
    parts, expected = nvfp4(weight(64, 1024))
    packed = read_weight(tmp_path, parts)
    assert torch.equal(packed.dequantize(), expected) and held(packed, parts) <= 1.05


def test_a_layer_of_comfyui_is_left_alone(tmp_path):
    parts, _ = int_quantized(weight())
    parts["comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    assert set(read(tmp_path, parts)) == {f"L.{name}" for name in parts}


def without(parts, name):
    return {key: value for key, value in parts.items() if key != name}


BAD = {
    "no scales": (lambda parts: without(parts, "weight_scale"), "its weight_scale is missing"),
    "no shape": (lambda parts: without(parts, "weight_shape"), "its weight_shape is missing"),
    "rows missing": (lambda parts: parts | {"weight_packed": parts["weight_packed"][:9]},
                     r"its weight_shape is \[96, 128\] and its weight_packed int32 \(9, 16\)"),
    "words with gaps": (lambda parts: parts | {"weight_packed": torch.zeros(96, 13).int()},
                        "expected words of 2, 3, 4, 8 bits a value without gaps"),
    "scales of other rows": (lambda parts: parts | {"weight_scale": torch.ones(7, 4)},
                             "expected some for each of 96 rows"),
    "zeros of other rows": (lambda parts: parts | {"weight_zero_point": torch.zeros(3, 4).int()},
                            r"its weight_zero_point is int32 \(3, 4\)"),
    "zeros of other bits": (
        lambda parts: parts | {"weight_zero_point": torch.full((96, 4), 8, dtype=torch.int8)},
        "expected 4-bit integers"),
    "groups of other columns": (lambda parts: parts | {"weight_g_idx": torch.zeros(9).int()},
                                "its columns do not name one of its 4 groups each"),
    "a shape of floats": (lambda parts: parts | {"weight_shape": parts["weight_shape"].float()},
                          "its weight_shape is float32"),
    "no groups": (lambda parts: parts | {"weight_scale": torch.ones(96, 0).bfloat16()},
                  "its 0 groups do not divide its 128 columns"),
    "groups of floats": (lambda parts: parts | {"weight_g_idx": torch.ones(128)},
                         "its columns do not name one of its 4 groups each"),
    "scales of doubles": (lambda parts: parts | {"weight_scale": parts["weight_scale"].double()},
                          "its scales are float64"),
    "codes of floats": (lambda parts: parts | {"weight_packed": torch.ones(96, 16)},
                        "expected rows of int32 or uint8"),
    "mxfp4": (lambda parts: {"weight_packed": torch.zeros(96, 64, dtype=torch.uint8),
                             "weight_scale": torch.zeros(96, 4, dtype=torch.uint8)},
              "of 4-bit floats, only nvfp4 is read"),
    "nvfp4 of other scales": (lambda parts: nvfp4(weight())[0] | {"weight_scale": torch.ones(96)},
                              r"expected fp8 E4M3 \(96, 8\) and one number"),
    "zeros of floats": (lambda parts: int_quantized(weight())[0] | {"weight": torch.ones(96, 128)},
                        r"expected int8 \(N, K\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_belong_together_are_a_sentence(case, tmp_path):
    change, message = BAD[case]
    with pytest.raises(WeightFileError, match="model.safetensors: 'L', packed by compressed-tensors"
                                              f".*{message}") as error:
        read(tmp_path, change(pack_quantized(weight())[0]))
    assert "\n" not in str(error.value)


@pytest.mark.heavy
@pytest.mark.parametrize(("bits", "symmetric", "group"), [
    (bits, symmetric, group) for bits in (2, 3, 4, 8) for symmetric in (False, True)
    for group in (32, None)])
def test_values_are_those_of_the_package(bits, symmetric, group, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    values = weight()
    _, scales, zeros = quantize(values, bits, group, torch.float32, symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, group_size=group,
        strategy="group" if group else "channel"))
    state_dict = {"weight": values, "weight_scale": scales,
                  "weight_zero_point": (zeros - (1 << bits - 1)).to(torch.int8)}
    stored = PackedQuantizationCompressor.compress(state_dict, scheme)
    expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    packed = read_weight(tmp_path, stored)
    assert torch.equal(packed.dequantize().to(expected.dtype), expected)


@pytest.mark.heavy
def test_nvfp4_is_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import NVFP4, QuantizationScheme

    parts, expected = nvfp4(weight())
    stored = {name: parts[name] for name in ("weight_packed", "weight_scale",
                                             "weight_global_scale")}
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)
    dense = NVFP4PackedCompressor.decompress(dict(stored), scheme)["weight"]
    packed = read_weight(tmp_path, stored).dequantize()
    assert torch.equal(packed.to(dense.dtype), dense)
    assert torch.equal(packed, expected)
