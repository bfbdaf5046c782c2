"""What a device has to do where torch dequantises and multiplies: how many kernels it launches and
how many bytes they move."""

import pytest
import torch
from memory_passes import META, Passes, low_rank, of_dequantizing, of_linear

from featherweight.ops.formats.base import FORMATS


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
