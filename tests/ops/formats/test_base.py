"""The base of packed formats: registration and shape algebra."""
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pack_api import FORMATS, Format, FormatError

from featherweight.ops import formats  # noqa: F401
from featherweight.ops.formats import base
from featherweight.ops.formats.column_groups import ColumnGroups
from featherweight.ops.formats.comfy_quant import INT8_ROWS
from featherweight.ops.formats.low_rank_and_joined import AddedLowRank, Joined


def test_second_claim_on_a_ggml_type_is_refused():
    with pytest.raises(TypeError, match="ggml type 8 is claimed by Q8_0 and Impostor"):
        class Impostor(Format, ggml_type=8):
            block_length, block_bytes = 32, 34
    assert "Impostor" not in FORMATS


def test_rows_that_do_not_divide_into_blocks_are_refused():
    with pytest.raises(FormatError, match="blocks of 32"):
        FORMATS["Q8_0"].packed_shape((4, 33))


class SlowLookup(dict):
    """Gives other threads time before each look-up."""

    def setdefault(self, *item):
        time.sleep(0.01)
        return super().setdefault(*item)


def low_rank():
    return AddedLowRank.of(INT8_ROWS.of_columns(64), 3, torch.float16, torch.float16, False)


@pytest.mark.parametrize("make", [
    lambda: FORMATS["NF4"].of_block_length(4096 * 3),
    lambda: INT8_ROWS.of_columns(77),
    lambda: ColumnGroups.of(FORMATS["Q8_0"], 96, 3, 1),
    low_rank,
    lambda: Joined.of(0, (FORMATS["Q8_0"], 3, 96), (FORMATS["Q4_0"], 5, 96)),
], ids=["NF4", "rows", "column groups", "low rank", "joined"])
def test_threads_that_need_a_new_format_at_once_get_the_same_one(make, monkeypatch):
    monkeypatch.setattr(base, "FORMATS", SlowLookup(FORMATS))
    barrier = threading.Barrier(4, timeout=60)

    def make_together():
        barrier.wait()
        return make()

    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(make_together) for _ in range(4)]
    assert len({future.result() for future in made}) == 1
