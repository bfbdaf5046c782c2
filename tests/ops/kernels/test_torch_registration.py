"""The operators' fakes: empty results of the shape and dtype that an operator computes."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels.validation import random_tensors
from featherweight.ops.layers import int8, product  # noqa: F401

ROWS, COLUMNS = 12, 512
LINEAR = ("input", "packed", "bias", "format", "rows", "down", "ups", "slices")
EMBEDDING = ("ids", "packed", "format", "columns", "dtype")
DEQUANTIZE = ("packed", "format", "shape", "dtype", "first")


def packed(name="Q4_K", rows=ROWS):
    return random_tensors(FORMATS[name], rows * COLUMNS // FORMATS[name].block_length,
                          torch.device("cpu"), bounded=True)


def linear_operands(**others):
    operands = {"input": torch.ones(2, 3, COLUMNS), "bias": torch.ones(ROWS),
                "format": "Q4_K", "rows": ROWS, "down": torch.ones(2, COLUMNS),
                "ups": [torch.ones(4, 2)], "slices": [8, 12, 0, 2]}
    if "packed" not in others:
        operands["packed"] = packed(others.get("format", "Q4_K"))
    return [{**operands, **others}[name] for name in LINEAR]


def embedding_operands(**others):
    operands = {
        "ids": torch.tensor([[0, 3]]), "packed": packed(), "format": "Q4_K", "columns": COLUMNS,
        "dtype": torch.float16
    }
    return [{**operands, **others}[name] for name in EMBEDDING]


def dequantize_operands(**others):
    operands = {
        "packed": packed(), "format": "Q4_K", "shape": [ROWS, COLUMNS], "dtype": torch.float16,
        "first": 0
    }
    return [{**operands, **others}[name] for name in DEQUANTIZE]


def fake(operator, operands):
    with FakeTensorMode() as mode:
        return operator(
            *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, operands))


SOUND = [("linear", linear_operands(**others))
         for others in ({}, {"format": "NF4"}, {"bias": None},
                        {"down": None, "ups": [], "slices": []})]
SOUND += [("embedding", embedding_operands()), ("dequantize", dequantize_operands()),
          ("dequantize", dequantize_operands(shape=[ROWS - 2, COLUMNS], first=2 * COLUMNS // 256))]


@pytest.mark.parametrize(
    ("name", "operands"), SOUND, ids=[f"{name}-{index}" for index, (name, _) in enumerate(SOUND)]
)
def test_a_fake_result_is_like_the_real_one(name, operands):
    operator = getattr(torch.ops.featherweight, name)
    expected, actual = operator(*operands), fake(operator, operands)
    assert (actual.shape, actual.dtype, actual.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
