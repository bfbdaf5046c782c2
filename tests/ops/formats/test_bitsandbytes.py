"""bitsandbytes' formats: the values of weights that the real bitsandbytes writes, bit for bit."""
import comfy.model_management
import pytest
import torch
from pack_api import FORMATS, FormatError, packed_operations, packed_tensor, packed_tensors, product

from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.layers import workspace

functional = pytest.importorskip("bitsandbytes").functional

# shapes: whole rows, blocks that cross rows, a short last block, odd, one value
WHOLE, CROSSING, SHORT, ODD, ONE = (12, 256), (10, 96), (7, 72), (5, 45), (1, 1)
CASES = [*(("nf4", shape) for shape in (WHOLE, CROSSING, SHORT, ODD)),
         *(("int8", shape) for shape in (WHOLE, ODD, ONE))]
each_case = pytest.mark.parametrize(("quant_type", "shape"), CASES, ids=str)


def packed_by_bitsandbytes(quant_type, shape, block_length=64):
    """A packed tensor of bitsandbytes' own bytes; its values, of codes and scales in float32; and
    those by bitsandbytes itself."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if quant_type == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(values.half())
        packed = packed_tensor(INT8.of_columns(shape[1]), codes.view(torch.uint8), shape,
                               scale=scales / 127)
        return (packed, codes * (scales / 127).unsqueeze(-1),
                functional.int8_vectorwise_dequant(codes, scales))
    data, state = functional.quantize_4bit(values, blocksize=block_length, quant_type=quant_type)
    packed_format = FORMATS[quant_type.upper()].of_block_length(block_length)
    assert torch.equal(torch.tensor(packed_format.codebook), state.code)
    codes = torch.stack([data.flatten().int() >> 4, data.flatten().int() & 15], -1).flatten()
    scales = state.absmax.repeat_interleave(block_length)[:values.numel()]
    return (packed_tensor(packed_format, data, shape, scale=state.absmax),
            (state.code[codes[:values.numel()].long()] * scales).view(shape),
            functional.dequantize_4bit(data, state))


@pytest.mark.parametrize(("quant_type", "shape", "block_length"), [
    *((*case, 64) for case in CASES), ("fp4", CROSSING, 64), ("nf4", SHORT, 128),
    ("fp4", ODD, 256)], ids=str)
def test_dequantizes_to_bitsandbytes_values(quant_type, shape, block_length, monkeypatch):
    packed, expected, theirs = packed_by_bitsandbytes(quant_type, shape, block_length)
    assert torch.equal(packed.dequantize(), expected)
    if shape == WHOLE:  # CPUs with AVX512 take the blocks to begin anew with each row
        torch.testing.assert_close(expected, theirs, rtol=1e-6, atol=0)
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES",
                        2 * packed.params.format.block_length)
    assert torch.equal(packed.dequantize(), expected)


@each_case
def test_linear_and_embedding_equal_the_dense_weight(quant_type, shape, monkeypatch):
    packed, expected, _ = packed_by_bitsandbytes(quant_type, shape)
    input = torch.randn(3, shape[1])
    for nbytes in (workspace.CPU_WORKSPACE_BYTES, 4 * 2 * shape[1]):
        monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", nbytes)
        assert torch.allclose(product.linear(input, packed),
                              torch.nn.functional.linear(input, expected), atol=1e-5)
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(product.embedding(ids, packed, torch.float32), expected[ids])


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_layer_keeps_it_packed_with_its_scales_which_the_host_counts(quant_type):
    packed, expected, _ = packed_by_bitsandbytes(quant_type, WHOLE)
    layer = packed_operations().Linear(256, 12, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    codes, scales = packed_tensors(packed)
    assert comfy.model_management.module_size(layer) == codes.nbytes + scales.nbytes
    layer.to("cpu:0").to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(packed_tensors(layer.weight)[1], scales)
    input = torch.randn(2, 256)
    assert torch.equal(layer.float()(input), torch.nn.functional.linear(input, expected))


def test_scales_of_another_shape_are_refused():
    packed, _, _ = packed_by_bitsandbytes("nf4", WHOLE)
    data, absmax = packed_tensors(packed)
    with pytest.raises(FormatError):
        packed_tensor(FORMATS["NF4"], data, WHOLE, scale=absmax[:-1])
