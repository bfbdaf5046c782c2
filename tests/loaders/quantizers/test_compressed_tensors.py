"""Weights of compressed-tensors against the package, and layers of ComfyUI beside them."""
import importlib

import pytest
import torch
from conformance.base import Written, read_weight, save, weight
from oracles import auto_round, installed
from pack_api import WeightFileError, open_weights
from quantizer_writers import E2M1, int_quantized, nvfp4, pack_quantized, quantize


def test_a_layer_of_comfyui_is_left_alone(tmp_path):
    parts, _ = int_quantized(weight(96, 128))
    parts["comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    weights = open_weights(save(tmp_path, Written(parts))).state_dict()
    assert set(weights) == {f"L.{name}" for name in parts}


def transformed(*locations):
    return {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [
        {"targets": ["Linear"], "location": location} for location in locations]}}}}


@pytest.mark.parametrize("settings", [
    transformed("weight_input", "input"), transformed("output"), transformed("q_attn"),
    {"rotation_config": {"block_size": 32, "hadamard_type": "hadamard"}},
    {"spinquant_config": {"r1": True}}])
def test_a_folder_whose_layers_rotate_their_inputs_is_refused(settings, tmp_path):
    parts, _ = pack_quantized(weight(96, 128))
    config = {"quant_method": "compressed-tensors"} | settings
    with pytest.raises(WeightFileError, match=(
            r": its config says that inputs of its layers are rotated while it runs, which is not"
            r" supported\. Get the model as ")):
        read_weight(tmp_path, parts, config=config)


@pytest.mark.parametrize("settings", [
    {}, {"transform_config": {}}, {"transform_config": None}, {"transform_config": "none"},
    {"transform_config": {"config_groups": [1]}}, {"rotation_config": None},
    {"transform_config": {"config_groups": {"u": 1, "v": {"apply": 3}, "w": {"apply": [4]}}}},
    transformed(), transformed("weight_input", "weight_output")])
def test_rotations_that_are_part_of_the_weights_need_nothing(settings, tmp_path):
    parts, values = pack_quantized(weight(96, 128))
    config = {"quant_method": "compressed-tensors"} | settings
    assert torch.equal(read_weight(tmp_path, parts, config=config).dequantize(), values)


@pytest.mark.heavy
@pytest.mark.parametrize(("bits", "symmetric", "group"), [
    (bits, symmetric, group) for bits in range(2, 9) for symmetric in (False, True)
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


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["MXFP4", "MXFP6", "MXFP8"])
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (7, 1056), (256, 64)])
def test_small_floats_are_those_of_the_package(name, is_random, shape, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp6.base import MXFP6PackedCompressor
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = {"MXFP4": MXFP4PackedCompressor, "MXFP6": MXFP6PackedCompressor,
                  "MXFP8": MXFP8QuantizationCompressor}[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=int(name[-1]), type="float", strategy="group", group_size=32,
        scale_dtype=torch.uint8))
    values = weight(*shape, seed=shape[0])
    peaks = values.view(shape[0], -1, 32).abs().amax(-1)
    scale = (peaks / {"4": 6, "6": 7.5, "8": 448}[name[-1]]).log2().ceil().exp2()
    stored = compressor.compress({"weight": values, "weight_scale": scale}, scheme)
    if is_random:
        generator = torch.Generator().manual_seed(len(values))
        # an exponent of 0 is 2**-127, and 0 to ComfyUI
        for part, lowest, largest in (("weight_packed", 0, 256), ("weight_scale", 1, 255)):
            if part in stored:
                stored[part] = torch.randint(lowest, largest, stored[part].shape,
                                             generator=generator).to(torch.uint8)
    dense = compressor.decompress(dict(stored), scheme)["weight"]
    packed = read_weight(tmp_path, stored, config={"quant_method": "compressed-tensors"})
    packed = packed.dequantize()
    # the package's bfloat16 holds each product, but those above its largest number
    assert torch.equal(packed.to(dense.dtype), dense)
    assert is_random or torch.equal(packed, dense.float())


@pytest.mark.heavy
@pytest.mark.parametrize("data_type", ["mx_fp4", "mx_fp8", "nv_fp4"])
@pytest.mark.parametrize("shape", [(96, 128), (7, 1056), (256, 64)])
def test_folders_of_auto_round_have_the_values_that_it_packed(data_type, shape, tmp_path,
                                                             monkeypatch):
    auto_round(monkeypatch)
    module = importlib.import_module("auto_round.export.export_to_autoround.qlinear_fp")
    rows, columns = shape
    bits, group = int(data_type[-1]), 16 if data_type == "nv_fp4" else 32
    layer = module.QuantLinear(bits, group, columns, rows, False, data_type=data_type,
                               act_bits=16)
    linear = torch.nn.Linear(columns, rows, bias=False)
    values = linear.weight.data = weight(*shape, seed=rows)
    blocks = values.view(rows, -1, group)
    peaks = blocks.abs().amax(-1)
    if data_type == "nv_fp4":
        of_tensor = (448 * 6 / values.abs().max()).view(1)
        scale = (peaks / 6 * of_tensor).to(torch.float8_e4m3fn).float()
        layer.pack(linear, scale, global_scale=of_tensor)
        factors = scale / of_tensor
    else:
        exponents = (peaks / (448 if bits == 8 else 6)).log2().ceil()
        layer.pack(linear, exponents)
        factors = exponents.exp2()
    stored = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    packed = read_weight(tmp_path, stored, config={
        "quant_method": "auto-round", "packing_format": f"auto_round:{data_type[:5]}"})
    packed = packed.dequantize().view(blocks.shape)
    # each number is one of its codes', and the nearest one
    numbers = (E2M1 if bits == 4 else
               torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float())
    numbers = numbers[numbers.isfinite()]
    candidates = numbers * factors[..., None, None]
    nearest = (blocks[..., None] - candidates).abs().amin(-1)
    is_one = (packed[..., None] == candidates).any(-1)
    assert is_one.all()
    assert ((blocks - packed).abs() <= nearest * 1.0001 + values.abs().max() * 1e-7).all()
