"""Stochastic rounding keeps the mean, and what a dtype has already."""
import numpy as np
import pytest
import torch

from featherweight.ops.layers.rounded_sum import add_small
from featherweight.ops.stochastic_rounding import stochastic_round

pytestmark = pytest.mark.usefixtures("fixed_seed")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def share_of(change: torch.Tensor, grid: torch.Tensor, dtype: torch.dtype) -> float:
    """How much of a change of values that a dtype has arrives."""
    moved = stochastic_round(grid + change, dtype).float() - grid
    return ((moved * change).sum() / change.square().sum()).item()


@each_dtype
def test_dithered_values_are_neighbours_and_right_on_average(dtype):
    values = torch.randn(1 << 23)
    rounded = stochastic_round(values.clone(), dtype).float()
    steps = torch.finfo(dtype).eps * (values.abs() + torch.finfo(dtype).smallest_normal)
    assert ((rounded - values).abs() <= steps).all()
    assert torch.equal(stochastic_round(values.clone(), dtype).float(), rounded)
    assert abs((rounded - values).mean() / steps.mean()) < 2e-3
    grid = values.to(dtype).float()
    # of a step that is added to values on the grid
    for share, allowed in ((0.01, 0.02), (0.1, 0.008), (0.4, 0.003)):
        change = share * torch.finfo(dtype).eps / 2 * grid * torch.rand(values.shape)
        assert abs(share_of(change, grid, dtype) - 1) < allowed


def floats(first: int, last: int) -> torch.Tensor:
    """All float32 numbers with these bits and those between, and the same with the other sign."""
    bits = torch.arange(first, last + 1, dtype=torch.int64)
    return torch.cat([bits, bits - (1 << 31)]).to(torch.int32).view(torch.float32)


@each_dtype
def test_dithering_keeps_each_number_of_the_dtype_and_nan_of_any_bits(dtype):
    """CUDA writes NaN as 0x7FFFFFFF, and as 0x7FFF in 16 bits."""
    held = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded, number = stochastic_round(held.float(), dtype), ~held.isnan()
    # the sign of zero too
    assert torch.equal(rounded.view(torch.int16)[number], held.view(torch.int16)[number])
    assert rounded[~number].isnan().all()
    assert add_small(held[~number], torch.tensor(0.1)).isnan().all()
    assert torch.equal(add_small(held[number], torch.tensor(0.0)), held[number])
    for first in (0x7F800001, 0x7FC00000 - 5000, 0x7FFFFFFF - 70000):
        assert stochastic_round(floats(first, first + 70000), dtype).isnan().all()


@pytest.mark.parametrize(("dtype", "first", "largest", "last"), [
    (torch.float16, 0x477FB000, 0x477FE000, 0x47802000),
    (torch.bfloat16, 0x7F7E0000, 0x7F7F0000, 0x7F800000)], ids=str)
def test_dithering_rounds_what_is_above_the_largest_number_to_the_nearest(
        dtype, first, largest, last):
    # of float16, 65504 to 65600; all that float32 has of bfloat16, and infinity
    above = floats(largest, last)
    assert torch.equal(stochastic_round(above.clone(), dtype), above.to(dtype))
    below = floats(first, largest)
    rounded = stochastic_round(below.clone(), dtype).float()
    assert rounded.isfinite().all()
    assert ((rounded - below).abs() < torch.finfo(dtype).eps * below.abs()).all()


def test_dithering_keeps_the_mean_of_numbers_that_are_subnormal_in_float16():
    step = 2.0 ** -24
    for size in (1e-3, 0.02, 0.3, 1.0, 7.7, 300.0, 1000.0):
        values = step * size * (0.5 + torch.rand(1 << 20))
        for signed in (values, -values):
            rounded = stochastic_round(signed.clone(), torch.float16).float()
            assert ((rounded - signed).abs() < step).all()
            spread = min(size, 0.5) ** 0.5 / (1 << 10)  # of the mean of so many, in steps
            assert abs((rounded - signed).mean() / step) < 5 * spread + 1e-4, size
    grid = step * torch.randint(-1023, 1024, (1 << 20,))
    change = step * 0.05 * torch.rand(grid.shape)
    assert abs(share_of(change, grid, torch.float16) - 1) < 0.03


@pytest.mark.parametrize(("dtype", "dropped"), [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
def test_the_choice_is_made_by_knuths_hash_of_the_values_own_bits(dtype, dropped):
    """So the same file is written on every machine and by every version."""
    values = torch.randn(1 << 20)
    values = values[values.abs() > 2.0 ** -14]
    bits = values.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    chance = (bits * 2654435769 & 0xFFFFFFFF) >> 32 - dropped
    expected = torch.from_numpy(
        (bits + chance >> dropped << dropped).astype(np.uint32).view(np.float32))
    for rounded in (
        stochastic_round(values.clone(), dtype),
        stochastic_round(values[:-1].clone().view(-1, 1).t(), dtype).flatten(),
    ):
        assert torch.equal(rounded.float(), expected[:len(rounded)])
