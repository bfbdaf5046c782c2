"""bitsandbytes' int8 format: the values of weights that the real bitsandbytes writes, bit for
bit."""
import pytest
import torch

from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.layers import product, workspace
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.tensor.packed_layout import packed_tensor, packed_tensors

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(12, 256), (7, 45), (1, 1)]


def packed_by_bitsandbytes(shape):
    """A packed tensor of bitsandbytes' own codes and scales, and its values: code times scale over
    127, in float32."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = functional.int8_vectorwise_quant(values.half())
    packed = packed_tensor(INT8.of_columns(shape[1]), codes.view(torch.uint8), shape,
                           scale=scales / 127)
    return (
        packed,
        codes * (scales / 127).unsqueeze(-1),
        functional.int8_vectorwise_dequant(codes, scales),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantizes_to_bitsandbytes_values(shape, monkeypatch):
    packed, expected, theirs = packed_by_bitsandbytes(shape)
    assert torch.equal(packed.dequantize(), expected) and torch.allclose(
        expected, theirs, rtol=1e-6, atol=0
    )
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES", 2 * shape[1])
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_embedding_equal_the_dense_weight(shape, monkeypatch):
    packed, expected, _ = packed_by_bitsandbytes(shape)
    input = torch.randn(3, shape[1])
    assert torch.allclose(product.linear(input, packed),
                          torch.nn.functional.linear(input, expected), atol=1e-5)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 4 * 2 * shape[1])
    assert torch.allclose(product.linear(input, packed),
                          torch.nn.functional.linear(input, expected), atol=1e-5)
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(product.embedding(ids, packed, torch.float32), expected[ids])


@pytest.mark.parametrize("index", [slice(2, 7), torch.tensor([5, 0, 5])], ids=["slice", "ids"])
def test_rows_take_their_scales_along(index):
    packed, expected, _ = packed_by_bitsandbytes((12, 256))
    packed_format, wanted = packed.params.format, expected[index]
    codes, scale = packed_format.rows(packed_tensors(packed), 256, index)
    assert torch.equal(
        packed_tensor(packed_format, codes, wanted.shape, scale=scale).dequantize(), wanted)


def test_a_layer_keeps_it_packed_and_counts_its_scales():
    import comfy.model_management
    packed, expected, _ = packed_by_bitsandbytes((12, 256))
    layer = packed_operations().Linear(256, 12, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    assert comfy.model_management.module_size(layer) == 12 * 256 + 12 * 4
    layer.to("cpu:0").to(torch.bfloat16)
    input = torch.randn(2, 256)
    assert torch.equal(layer.float()(input), torch.nn.functional.linear(input, expected))
