"""What a device has to do where torch dequantises and multiplies: how many kernels it launches and
how many bytes they move."""
import re

import pytest
import torch
from memory_passes import META, Passes, every_format, low_rank, of_dequantizing, of_linear

from featherweight.ops.formats.base import DEVICE_CHUNK_VALUES, FORMATS
from featherweight.ops.formats.row_layout import RowFormat

# Launches a chunk, and bytes a value of bfloat16. NF4: a lookup takes its index in int32 and gives
# float32, and the value is rounded only when it is scaled, so no table of two values a byte needs
# less than 14.5.
MOST = {
    "Q8_0": (2, 4), "NF4": (3, 15), "FP4": (3, 15), "Q4_0": (6, 10), "Q4_K": (13, 16),
    "Q6_K": (11, 17),
    # levels are scaled, rounded, limited and rotated in float32
    "W4A8": (12, 49), "W4A8_INTEGERS": (12, 49), "W6A8": (20, 65),
    # values are rotated in one order, a stage of pairs after the other
    "F8_E4M3_CONVROT": (40, 128), "F8_E5M2_CONVROT": (40, 128), "MXFP8_CONVROT": (42, 128),
    "NVFP4_CONVROT": (43, 128),
    # a factor of each column too
    "F8_SMOOTHED": (4, 28), "NVFP4_SMOOTHED": (7, 25), "NVFP4_LOW_SMOOTHED": (7, 25),
    "SVDQUANT_NVFP4": (7, 25),
    # several codes in a byte, or one over two bytes, and zeros of groups
    "INT2_GROUPED": (9, 39), "UINT2_GROUPED": (12, 47), "INT3_GROUPED": (11, 42),
    "UINT3_GROUPED": (12, 50), "UINT8_GROUPED": (5, 28), "QUANTO_INT2": (11, 39),
    "HQQ_INT2": (11, 39), "MLX_INT2": (11, 39), "MLX_INT3": (12, 36),
    # columns that name their groups; levels that codes select; numbers and minima of the weight
    "INT2_GROUPED_ORDERED": (10, 39), "UINT2_GROUPED_ORDERED": (14, 55),
    "INT3_GROUPED_ORDERED": (12, 42), "UINT3_GROUPED_ORDERED": (14, 52),
    "UINT4_GROUPED_ORDERED": (10, 39), "UINT8_GROUPED_ORDERED": (7, 30),
    "SDNQ_CODEBOOK4": (8, 41), "SDNQ_CODEBOOK7": (34, 79), "SDNQ_CODEBOOK8": (4, 32),
    "W4A8_TABLE": (11, 60), "W4A8_SHIFTED": (46, 169)
}
MOST_OF_ANY = 20, 24
# SDNQ's: codes of 1, 2, 3, 5, 6 or 7 bits; bytes whose numbers are in a table, and minima
MOST_OF_PACKS, MOST_OF_BYTES = (35, 75), (6, 28)
MOST_OF_STREAMS = 24, 68  # codes of 5 to 7 bits, over two bytes
each_format = pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.name)


def test_views_and_fresh_memory_are_no_launches_and_move_nothing():
    with Passes() as passes:
        torch.empty(4, 4, device=META).view(2, 8)[:, 2:].t().unsqueeze(0).expand(3, -1, -1)
    assert (passes.launches, passes.moved, passes.names) == (0, 0, [])


def test_inputs_are_read_once_without_what_is_repeated_and_outputs_written():
    whole, part, row = (torch.empty(shape, device=META) for shape in ((8, 4), (8, 6), (4,)))
    half = torch.empty(8, 4, dtype=torch.float16, device=META)
    for run, moved in [
        (lambda: whole + row.expand(8, 4), 4 * (32 + 4 + 32)),
        (lambda: whole.mul_(part[:, 2:]), 4 * (32 + 32 + 32)),
        (lambda: torch.mul(whole, 2, out=half), 4 * 32 + 2 * 32),
        (lambda: half.copy_(whole), 4 * 32 + 2 * 32),
        (lambda: torch.stack([row, row]), 4 * (8 + 8)),
    ]:
        with Passes() as passes:
            run()
        assert (passes.launches, passes.moved) == (1, moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_format
def test_a_chunk_takes_few_launches_and_moves_few_bytes(fmt, dtype):
    passes = of_dequantizing(fmt, dtype)
    family = re.sub("_(HALF|FLOAT)$", "", getattr(fmt, "family", fmt.name))
    codes = fmt.layout.codes if isinstance(fmt, RowFormat) else None
    most = MOST_OF_ANY
    if codes is not None and codes.order == "packs" and codes.bits not in (4, 8):
        most = MOST_OF_PACKS
    elif codes is not None and codes.order == "stream" and codes.bits in (5, 6, 7):
        most = MOST_OF_STREAMS
    elif codes is not None and codes.bits == 8 and codes.numbers:
        most = MOST_OF_BYTES
    launches, nbytes = MOST.get(family, most)
    assert 0 < passes.launches <= launches, passes.names
    assert passes.moved <= (nbytes + dtype.itemsize - 2) * DEVICE_CHUNK_VALUES, passes.names


@pytest.mark.parametrize("name", ["Q8_0", "NF4", "Q4_K", "BF16"])
def test_a_product_is_one_launch_beside_dequantizing_and_a_branch_three(name):
    rows, columns = 512, 1024  # one chunk
    dequantizing = 0 if name == "BF16" else of_dequantizing(FORMATS[name]).launches
    assert of_linear(FORMATS[name], rows, columns).launches == dequantizing + 1
    assert (
        of_linear(FORMATS[name], rows, columns, low_rank(rows, columns, 32, 1)).launches
        == dequantizing + 4
    )


def test_branches_on_all_rows_are_written_once_and_nothing_is_cleared_for_them():
    of_whole, of_parts = (of_linear(FORMATS["Q8_0"], 768, 512,
                                    low_rank(768, 512, 48 // parts, parts)) for parts in (1, 3))
    assert of_parts.launches == of_whole.launches + 2
    # what three products read more, and no pass over the output
    assert of_parts.moved - of_whole.moved < 4608 * 768 * 2 / 4
