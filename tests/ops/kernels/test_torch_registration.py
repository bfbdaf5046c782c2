"""The operators as torch checks them: their schemas, and fakes that give empty results of the shape
and dtype that an operator computes."""
import pytest
import torch
from pack_api import (
    FORMATS,
    product,  # noqa: F401
    random_tensors,
)

from featherweight.ops.layers import fast_on_cpu  # noqa: F401
from featherweight.ops.low_rank import LowRank

ROWS, COLUMNS = 12, 512
NO_BRANCH = None, [], []


def packed(name="Q4_K"):
    return random_tensors(FORMATS[name], ROWS * COLUMNS // FORMATS[name].block_length,
                          torch.device("cpu"), bounded=True)


def branch(*slices):
    """Operands of LoRAs of rank 2 on slices of rows."""
    return LowRank.from_factors([
        (torch.ones(end - first, 2), torch.ones(2, COLUMNS), (first, end))
        for first, end in slices], ROWS, torch.float32).operands


INPUT, BIAS, IDS = torch.ones(2, 3, COLUMNS), torch.ones(ROWS), torch.tensor([[0, 3]])
CALLS = [
    *(("linear", (INPUT, packed(name), bias, name, ROWS, *low_rank)) for name, bias, low_rank in (
        ("Q4_K", BIAS, branch((8, 12))), ("NF4", BIAS, branch((8, 12))),
        ("Q4_K", None, branch((8, 12))), ("Q4_K", BIAS, NO_BRANCH), ("Q4_K", None, NO_BRANCH),
        ("Q8_0", None, branch((0, 12), (2, 6))), ("Q8_0", BIAS, branch((0, 12), (2, 6))))),
    *(("embedding", (IDS, packed(), "Q4_K", COLUMNS, dtype))
      for dtype in (torch.float16, torch.float32)),
    *(("dequantize", (packed(), "Q4_K", [ROWS, COLUMNS], dtype))
      for dtype in (torch.float16, torch.bfloat16)),
    ("dequantize", (packed(), "Q4_K", [ROWS - 2, COLUMNS], torch.float16, 2 * COLUMNS // 256))]


@pytest.mark.parametrize(("name", "operands"), CALLS, ids=[
    f"{name}-{index}" for index, (name, _) in enumerate(CALLS)])
def test_an_operator_has_a_right_schema_and_fake(name, operands):
    torch.library.opcheck(getattr(torch.ops.featherweight, name).default, operands)
