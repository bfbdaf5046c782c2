"""Weights whose makers add a constant to the input: values and products are those without it."""
import pickle
import random

import pytest
import torch
from pack_api import is_packed, join_packed, packed_tensor, product, random_tensors, with_low_rank

from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.formats.svdquant import ShiftedInput
from featherweight.ops.tensor.packed_layout import PickledWeight, with_input_shift
from featherweight.ops.tensor.row_slicing import join_rows, take_rows

CPU = torch.device("cpu")


@pytest.fixture(params=[name for name in FAMILIES if name.startswith("SVDQUANT_INT4")])
def weights(request):
    """A weight, and the same with a shift."""
    draw = random.Random(request.param)
    torch.manual_seed(draw.randrange(1000))
    rows, columns, rank = 8 * draw.randint(2, 9), 64 * draw.randint(1, 5), draw.randint(0, 9)
    packed_format = FAMILIES[request.param].of_columns(columns)
    data, *sides = random_tensors(packed_format, rows, CPU, bounded=True)
    plain = packed_tensor(packed_format, data, (rows, columns), torch.float32, *sides)
    if rank:
        plain = with_low_rank(plain, torch.randn(rows, rank), torch.randn(rank, columns))
    return plain, with_input_shift(plain, torch.randn(rows))


def test_values_titles_and_products_are_those_of_the_weight(weights):
    plain, shifted = weights
    input = torch.randn(5, plain.shape[1])
    assert isinstance(shifted.params.format, ShiftedInput)
    assert shifted.params.format.title() == plain.params.format.title()
    assert torch.equal(shifted.dequantize(), plain.dequantize())
    assert torch.equal(product.dequantize(shifted, torch.bfloat16),
                       product.dequantize(plain, torch.bfloat16))
    for fast in (False, True):
        assert torch.equal(product.linear(input, shifted, fast=fast),
                           product.linear(input, plain, fast=fast))


def test_rows_keep_the_shift_when_they_are_taken_joined_and_pickled(weights):
    _, shifted = weights
    cut = random.Random(1).randrange(1, len(shifted))
    parts = [take_rows(shifted, part) for part in (slice(0, cut), slice(cut, None))]
    assert all(map(is_packed, parts))
    assert torch.equal(parts[1].params.input_shift, shifted.params.input_shift[cut:])
    again = join_rows(parts)
    assert again.params.format is shifted.params.format
    assert torch.equal(again.params.input_shift, shifted.params.input_shift)
    again = pickle.loads(pickle.dumps(PickledWeight(torch.nn.Parameter(shifted, False))))
    assert torch.equal(again.params.input_shift, shifted.params.input_shift)
    for axis in (0, 1):
        joined = join_packed([shifted, shifted], axis)
        assert torch.equal(joined.dequantize(), torch.cat([shifted.dequantize()] * 2, axis))
        input = torch.randn(3, joined.shape[1])
        torch.testing.assert_close(product.linear(input, joined),
                                   input @ joined.dequantize().t(), rtol=1e-4, atol=1e-3)
