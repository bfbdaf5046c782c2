"""Kernels whose codes have their positions outermost, next to the same rows by channels."""
import random

import pytest
import torch
from pack_api import FORMATS, packed_tensors, product

from featherweight.ops import kernels
from featherweight.ops.formats._names import format_named
from featherweight.ops.formats.comfy_quant import INT8_CONVROT, INT8_ROWS
from featherweight.ops.tensor.packed_layout import packed_rows, with_taps_first

draw = random.Random(3)
CASES = [(draw.randrange(1, 60), draw.choice((4, 16, 64)), draw.randrange(1, 5),
          (draw.randrange(1, 5), draw.randrange(1, 5))) for _ in range(6)]


def kernel_of(rows, group, groups, taps):
    """A packed kernel (N, C, ...) and its values by the rows of its base."""
    channels, count = group * groups, taps[0] * taps[1]
    codes = torch.randint(-128, 128, (rows, count, channels), dtype=torch.int8)
    base = packed_rows(INT8_CONVROT, codes, codes.shape, (group,), scale=torch.rand(rows) + 0.1)
    shape = (rows, channels, *taps)
    return with_taps_first(base, shape), base.dequantize().transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_those_of_the_base_by_channels(case, dtype):
    packed, expected = kernel_of(*case)
    assert torch.equal(product.dequantize(packed, dtype), expected.to(dtype))
    assert torch.equal(packed.dequantize(), expected)
    first, packed_format = len(packed) // 2, packed.params.format
    out = torch.empty(expected[first:].shape, dtype=dtype)
    for dequantize in (kernels.dequantize_into, type(packed_format).dequantize_into):
        dequantize(packed_format, packed_tensors(packed), out, first)
        assert torch.equal(out, expected[first:].to(dtype))


def test_another_process_finds_the_format_by_its_name():
    packed_format = kernel_of(*CASES[0])[0].params.format
    name = packed_format.name
    del FORMATS[name]
    assert format_named(name).name == name and format_named(name).outer == packed_format.outer


def test_it_is_named_after_its_base_and_is_one_of_comfyuis():
    codes = torch.ones(2, 9, 4).char()
    base = packed_rows(INT8_ROWS, codes, codes.shape, scale=torch.ones(2))
    packed_format = with_taps_first(base, (2, 4, 3, 3)).params.format
    assert packed_format.title() == "INT8_ROWS" and packed_format.is_host_format
