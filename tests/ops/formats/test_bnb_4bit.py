"""bitsandbytes' 4-bit formats: the values of files that the real bitsandbytes writes, bit for
bit."""
import pytest
import torch

from featherweight.ops.formats.base import FORMATS, FormatError
from featherweight.ops.layers import product, workspace
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.tensor.packed_layout import packed_tensor, packed_tensors

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

SHAPES = {
    "whole rows": (12, 256), "blocks cross rows": (10, 96), "a short last block": (7, 72),
    "odd": (5, 45)
}


def packed_by_bitsandbytes(shape, quant_type="nf4", block_length=64):
    """A packed tensor of bitsandbytes' own bytes, and its values: bitsandbytes' code times its
    absmax, in float32."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(values, blocksize=block_length, quant_type=quant_type)
    codes = torch.stack(
        [data.flatten().int() >> 4, data.flatten().int() & 15], -1).flatten()[:values.numel()]
    scales = state.absmax.repeat_interleave(block_length)[:values.numel()]
    packed_format = FORMATS[quant_type.upper()].of_block_length(block_length)
    return (
        packed_tensor(packed_format, data, shape, scale=state.absmax),
        (state.code[codes.long()] * scales).view(shape),
        state,
    )


@pytest.mark.parametrize("block_length", [64, 128, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dequantizes_to_bitsandbytes_values(shape, quant_type, block_length, monkeypatch):
    packed, expected, _ = packed_by_bitsandbytes(shape, quant_type, block_length)
    assert torch.equal(packed.dequantize(), expected)
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES", 2 * block_length)
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_codebook_is_bitsandbytes_own(quant_type):
    _, _, state = packed_by_bitsandbytes((4, 64), quant_type)
    assert torch.equal(torch.tensor(FORMATS[quant_type.upper()].codebook), state.code)


def test_equals_bitsandbytes_dequantize_where_that_is_right():
    packed, _, state = packed_by_bitsandbytes((12, 256))
    assert torch.equal(packed.dequantize(), functional.dequantize_4bit(packed._qdata, state))


def test_right_where_bitsandbytes_own_kernels_are_wrong():
    """On CPUs with AVX512 they take the blocks to begin anew with each row. So nothing here calls
    them."""
    packed, expected, state = packed_by_bitsandbytes((10, 96))
    input = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    product_expected = torch.nn.functional.linear(input, expected)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.allclose(product.linear(input, packed), product_expected, atol=1e-5)
    theirs = functional.dequantize_4bit(packed._qdata, state)
    if torch.equal(theirs, expected):
        pytest.skip("bitsandbytes is right on this CPU")
    assert (theirs - expected).norm() > 0.1 * expected.norm()
    their_product = bitsandbytes.matmul_4bit(input, packed._qdata.t(), state)
    assert (their_product - product_expected).norm() > 0.1 * product_expected.norm()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_and_embedding_equal_the_dense_weight(shape, monkeypatch):
    packed, expected, _ = packed_by_bitsandbytes(shape)
    input = torch.randn(3, shape[1])
    assert torch.allclose(product.linear(input, packed),
                          torch.nn.functional.linear(input, expected), atol=1e-5)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 4 * 2 * shape[1])
    assert torch.allclose(product.linear(input, packed),
                          torch.nn.functional.linear(input, expected), atol=1e-5)
    ids = torch.tensor([[0, 4], [2, 1]])
    assert torch.equal(product.embedding(ids, packed, torch.float32), expected[ids])


def test_a_layer_keeps_it_packed_with_its_scales_wherever_it_goes():
    packed, expected, _ = packed_by_bitsandbytes((12, 256))
    layer = packed_operations().Linear(256, 12, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    layer.to("cpu:0").to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(
        packed_tensors(layer.weight)[1], packed_tensors(packed)[1]
    )
    input = torch.randn(2, 256)
    assert torch.equal(layer.float()(input), torch.nn.functional.linear(input, expected))


def test_scales_of_another_shape_are_refused():
    packed, _, _ = packed_by_bitsandbytes((12, 256))
    data, absmax = packed_tensors(packed)
    with pytest.raises(FormatError):
        packed_tensor(FORMATS["NF4"], data, (12, 256), scale=absmax[:-1])


def test_the_host_counts_codes_and_scales():
    import comfy.model_management
    packed, _, _ = packed_by_bitsandbytes((12, 256))
    layer = packed_operations().Linear(256, 12, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    codes, absmax = packed_tensors(packed)
    assert comfy.model_management.module_size(layer) == codes.nbytes + absmax.nbytes
