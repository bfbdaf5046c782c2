"""Weights of compressed-tensors against the package, and layers of ComfyUI beside them."""
import pytest
import torch
from conformance.base import Written, read_weight, save, weight
from oracles import installed
from quantizer_writers import int_quantized, nvfp4, quantize

from featherweight.loaders.files.open_weights import open_weights


def test_a_layer_of_comfyui_is_left_alone(tmp_path):
    parts, _ = int_quantized(weight(96, 128))
    parts["comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    weights = open_weights(save(tmp_path, Written(parts))).state_dict()
    assert set(weights) == {f"L.{name}" for name in parts}


@pytest.mark.heavy
@pytest.mark.parametrize(("bits", "symmetric", "group"), [
    (bits, symmetric, group) for bits in (2, 3, 4, 8) for symmetric in (False, True)
    for group in (32, None)])
def test_values_are_those_of_the_package(bits, symmetric, group, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    values = weight(96, 128)
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

    parts, expected = nvfp4(weight(96, 128))
    stored = {name: parts[name] for name in ("weight_packed", "weight_scale",
                                             "weight_global_scale")}
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)
    dense = NVFP4PackedCompressor.decompress(dict(stored), scheme)["weight"]
    packed = read_weight(tmp_path, stored).dequantize()
    assert torch.equal(packed.to(dense.dtype), dense)
    assert torch.equal(packed, expected)
