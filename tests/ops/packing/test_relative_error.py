"""Whether a type holds a weight: seen by rows, not only in the sum over all of them."""
import random

import pytest
import torch
from pack_api import ROW_TYPES

from featherweight.ops.formats.base import TooLargeError
from featherweight.ops.packing.pack_types import TYPES
from featherweight.ops.packing.relative_error import RelativeError, float_values, holds

ROWS, COLUMNS = 32, 512
PER_TENSOR = [name for name, row_type in ROW_TYPES.items() if row_type.is_per_tensor]
# scales of blocks, of each block apart, of rows, and of the whole weight
SAMPLE = ("Q4_K", "NF4", "int8_convrot", *PER_TENSOR)
each_type = pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in SAMPLE else pytest.mark.heavy)
    for name, each in TYPES.items() if each.menus])


def drawn(name: str) -> tuple[random.Random, torch.Tensor]:
    rng = random.Random(name)
    generator = torch.manual_seed(rng.randrange(1 << 32))
    values = torch.randn(ROWS, COLUMNS, generator=generator) / 30
    return rng, values * (torch.rand(ROWS, 1, generator=generator) + 0.1)


@each_type
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("magnitude", [1e3, 1e30])
def test_a_row_whose_other_values_are_gone_is_seen(name, count, magnitude):
    rng, values = drawn(f"{name} {count}")
    row = rng.randrange(ROWS)
    values[row, rng.sample(range(COLUMNS), count)] = rng.choice([-1, 1]) * magnitude
    try:
        packed = TYPES[name].pack(values)
    except TooLargeError:
        return  # is told too
    off = (float_values(packed) - values).abs() >= 0.95 * values.abs()
    emptied = (off.sum(1) >= COLUMNS - count).any().item()
    assert holds(packed, values) == (not emptied)
    if name in PER_TENSOR and magnitude == 1e30:
        assert emptied and off.sum() == ROWS * COLUMNS - count  # every other value of the weight


def test_a_row_behind_the_sample_is_seen(monkeypatch):
    monkeypatch.setattr("featherweight.ops.packing.relative_error.SAMPLE_VALUES", 4 * COLUMNS)
    _, values = drawn("behind")
    values[ROWS - 1, 7] = 1e30
    error = RelativeError()
    error.add(values, TYPES["int8_convrot"].pack(values))
    assert not error.is_small and error.share < 0.25


@each_type
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "dead rows", "a dead weight", "zeros"])
def test_weights_as_models_have_them_are_held(name, kind):
    rng, values = drawn(f"{name} {kind}")
    if kind == "heavy tails":
        values = torch.distributions.StudentT(3.0).sample((ROWS, COLUMNS)) / 30
    elif kind == "dead rows":
        values[rng.sample(range(ROWS), 5)] *= 1e-12
    elif kind == "a dead weight":
        values[:] = 0
        values[rng.randrange(ROWS)] = 0.01
    elif kind == "zeros":
        values[torch.rand(values.shape) < 0.97] = 0
    assert holds(TYPES[name].pack(values), values)
