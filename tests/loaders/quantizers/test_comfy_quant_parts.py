"""What is written of a packed weight is what ComfyUI's own layers save, and is read as the same
bytes."""
import json

import comfy.ops
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from host_formats import mark_of
from pack_api import ROW_TYPES, packed_tensors

from featherweight.loaders.quantizers.comfy_quant import layer_parts, pack_parts, row_type_of
from featherweight.ops.tensor.row_slicing import take_rows

# (rows, columns); of 272 and 80 columns no 64 rotate, of 100 none; the last have one block in a row
SHAPES = [(160, 512), (32, 256), (48, 320), (272, 272), (16, 80), (7, 100), (300, 1024), (48, 16),
          (64, 16), (128, 32), (96, 64), (36, 128), (20, 256)]
HOSTS_TYPES = [name for name in ROW_TYPES if name == "int8_convrot" or name in QUANT_ALGOS]
SIZES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def packed(name: str, shape: tuple[int, int], rows: int | None = None):
    """A random weight in a row type, its first rows alone."""
    if not ROW_TYPES[name].takes(shape):
        pytest.skip(f"a format does not hold the shape: {name}, {shape}")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    weight[:, 3] *= 40
    weight[1] = 0
    return take_rows(ROW_TYPES[name].pack(weight), slice(0, rows))


def of_the_host(settings: dict, parts: dict[str, torch.Tensor],
                shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What ComfyUI's own layer saves once it has loaded some parts, and its values."""
    layer = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(
        shape[1], shape[0], bias=False)
    missing = layer.load_state_dict({**parts, "comfy_quant": mark_of(settings)})
    assert not any(missing)
    return layer.state_dict(), layer.weight.dequantize()


@SIZES
@pytest.mark.parametrize("name", HOSTS_TYPES)
def test_parts_are_those_that_the_hosts_layer_saves(name, shape):
    weight = packed(name, shape)
    settings, parts = layer_parts(weight)
    saved, values = of_the_host(settings, dict(parts), shape)
    assert json.loads(saved.pop("comfy_quant").numpy().tobytes()) == settings
    assert saved.keys() == parts.keys()
    for part, tensor in parts.items():
        stored = saved[part]
        if name == "mxfp8" and part == "weight_scale":
            stored = stored.view(torch.uint8)
        assert (tensor.dtype, tensor.shape) == (stored.dtype, stored.shape), part
        assert torch.equal(tensor.view(-1).view(torch.uint8), stored.view(-1).view(torch.uint8))
    exact = weight.dequantize()
    # kitchen rotates by a product in float32, whose sums round differently on each CPU
    limit = 3e-6 if name == "convrot_w4a4" else 1e-6
    assert (values - exact).abs().max() <= limit * exact.abs().max()


@SIZES
@pytest.mark.parametrize("name", ROW_TYPES)
def test_parts_are_read_as_the_same_bytes(name, shape):
    weight = packed(name, shape)
    again = pack_parts(*layer_parts(weight))
    assert again.params.format is weight.params.format and row_type_of(again) == name
    for tensor, expected in zip(packed_tensors(again), packed_tensors(weight), strict=True):
        assert torch.equal(tensor.view(-1), expected.view(-1))


@pytest.mark.parametrize("rows", [1, 15, 100, 129])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_rows_are_filled_up_as_the_kitchen_does(name, rows):
    weight = packed(name, (160, 512), rows)
    settings, parts = layer_parts(weight)
    layout = QUANT_ALGOS[name]["comfy_tensor_layout"]
    plain = comfy.ops.QuantizedTensor.from_float(weight.dequantize(), layout).state_dict("weight")
    assert {part: tensor.shape for part, tensor in parts.items()} == {
        part: tensor.shape for part, tensor in plain.items()}
    again = pack_parts(settings, parts).dequantize()
    assert torch.equal(again[:rows], weight.dequantize()) and not again[rows:].any()


@pytest.mark.parametrize("name", ROW_TYPES)
def test_the_parts_of_a_shape_are_known_without_values(name):
    weight = packed(name, (256, 512))
    settings, parts = layer_parts(weight)
    empty = layer_parts(weight.to("meta"))
    assert empty[0] == settings
    assert {part: (tensor.dtype, tensor.shape) for part, tensor in empty[1].items()} == {
        part: (tensor.dtype, tensor.shape) for part, tensor in parts.items()}


@pytest.mark.parametrize("name", ["float8_e4m3fn", "nvfp4"])
def test_rows_with_other_numbers_are_no_weight_of_one_number(name):
    weight = packed(name, (64, 512))
    assert row_type_of(weight) == name
    weight.params.qparams[-1][5] *= 2
    assert row_type_of(weight) is None
    assert row_type_of(torch.zeros(4, 4)) is None
