"""The order of Nunchaku's tiles, and the values of its formats."""
import pytest
import torch
from nunchaku_writer import (
    E2M1,
    interleave,
    tile_awq,
    tile_bytes,
    tile_codes,
    tile_low_rank,
    tile_numbers,
    tile_vector,
)

from featherweight.loaders.quantizers import nunchaku_tiles as tiles
from featherweight.ops.formats.row_layout import FAMILIES

SIZES = pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (640, 256)])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def random_codes(*shape) -> torch.Tensor:
    return torch.randint(16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pairs(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


@SIZES
def test_codes_come_in_rows(rows, columns):
    codes = random_codes(rows, columns)
    assert torch.equal(tiles.codes_in_rows(tile_codes(codes)), pairs(codes))
    for dtype in (torch.int16, torch.int32):
        stored = tile_awq(codes).view(dtype)
        assert torch.equal(tiles.awq_codes_in_rows(stored), pairs(codes))


@SIZES
@HALVES
def test_numbers_come_in_rows(rows, columns, dtype):
    scales = torch.randn(rows, columns // 64).to(dtype)
    assert torch.equal(tiles.numbers_in_rows(tile_numbers(scales)), scales)
    assert torch.equal(tiles.vector_in_order(tile_vector(scales[:, 0])), scales[:, 0])
    of_sixteen = torch.randn(rows, columns // 16).to(torch.float8_e4m3fn)
    stored = tile_bytes(of_sixteen)
    assert torch.equal(tiles.scale_bytes_in_rows(stored), of_sixteen.view(torch.uint8))


@SIZES
@pytest.mark.parametrize("rank", [16, 48])
def test_low_ranks_come_in_rows(rows, columns, rank):
    up, down = torch.randn(rows, rank).half(), torch.randn(rank, columns).half()
    assert torch.equal(tiles.up_in_rows(tile_low_rank(up, False)), up)
    assert torch.equal(tiles.down_in_rows(tile_low_rank(down, True)), down)


@pytest.mark.parametrize("parts", [3, 6])
def test_rows_of_modulations_come_part_by_part(parts):
    for rows in (torch.randn(128 * parts), torch.randn(128 * parts, 5)):
        assert torch.equal(tiles.parts_in_order(interleave(rows, parts), parts), rows)


def scale_bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.contiguous().view(torch.uint8).view(-1)


@HALVES
def test_values_of_int4_are_codes_times_scales_by_divisors(dtype):
    family = FAMILIES["SVDQUANT_INT4" if dtype == torch.bfloat16 else "SVDQUANT_INT4_HALF"]
    codes, scales = random_codes(5, 192), torch.rand(5, 3).to(dtype)
    of_rows, of_columns = torch.rand(5), torch.rand(192)
    values = family.of_columns(192).dequantize(
        pairs(codes), scale_bytes(scales), of_rows, of_columns)
    integers = torch.where(codes > 7, codes.int() - 16, codes.int()).float().view(5, 3, 64)
    expected = integers * (scales.float() * of_rows[:, None])[..., None]
    assert torch.equal(values, expected.view(5, 192) * of_columns)


def test_values_of_nvfp4_are_codes_times_both_scales_by_divisors():
    codes, scales = random_codes(5, 96), torch.rand(5, 6).to(torch.float8_e4m3fn)
    of_rows, of_columns = torch.rand(5), torch.rand(96)
    values = FAMILIES["SVDQUANT_NVFP4"].of_columns(96).dequantize(
        pairs(codes), scale_bytes(scales), of_rows, of_columns)
    expected = E2M1[codes.long()].view(5, 6, 16) * (scales.float() * of_rows[:, None])[..., None]
    assert torch.equal(values, expected.view(5, 96) * of_columns)


@HALVES
@pytest.mark.parametrize("group", [64, 128])
def test_values_of_awq_are_codes_times_scales_plus_zeros(dtype, group):
    family = FAMILIES["AWQ_INT4" if dtype == torch.bfloat16 else "AWQ_INT4_HALF"]
    codes = random_codes(5, 256)
    scales, zeros = (torch.randn(5, 256 // group).to(dtype) for _ in range(2))
    values = family.of_columns(256, group).dequantize(
        pairs(codes), scale_bytes(scales), scale_bytes(zeros))
    expected = (codes.float().view(5, -1, group) * scales.float()[..., None]
                + zeros.float()[..., None])
    assert torch.equal(values, expected.view(5, 256))
