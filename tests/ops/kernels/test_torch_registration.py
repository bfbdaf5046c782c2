"""The operators' fakes: what torch is told of a result before it is computed, and of operands that
cannot give one."""
import re

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


BROKEN_LINEAR = [
    ({"input": torch.ones(2, COLUMNS, dtype=torch.int64)},
     "The input is (2, 512) of torch.int64; expected rows of floats."),
    ({"input": torch.ones(2,
                          256)}, "3456 bytes of Q4_K hold 6144 values, not a weight of 12 x 256."),
    ({"packed": packed(rows=10)}, "2880 bytes of Q4_K hold 5120 values, not a weight of 12 x 512."),
    ({"packed": [packed()[0].view(torch.int8)]}, "of torch.int8; expected uint8."),
    ({"packed": [*packed(), torch.ones(24)]}, "A weight in Q4_K has 1 tensors, not 2."),
    ({"format": "NF4", "packed": [packed("NF4")[0], packed("NF4")[1].half()]},
     "The scales of a weight in NF4 are (96,) of torch.float16; expected float32."),
    ({"format": "NF4", "packed": [packed("NF4")[0], packed("NF4")[1][:95]]},
     "95 scales of NF4 were given for a weight of 12 x 512, which has 96 blocks."),
    ({"format": "Q9_9", "packed": packed()}, "There is no packed format Q9_9."),
    ({"bias": torch.ones(ROWS + 1)},
     "The bias is (13,) of torch.float32; expected (12,) of torch.float32."),
    ({"bias": torch.ones(ROWS).half()},
     "The bias is (12,) of torch.float16; expected (12,) of torch.float32."),
    ({"down": None}, "A low-rank branch has up factors and no down factor."),
    ({"down": torch.ones(2, COLUMNS).half()},
     "A low-rank factor is (2, 512) of torch.float16; expected a matrix of torch.float32."),
    ({"down": torch.ones(2, COLUMNS, 1)},
     "A low-rank factor is (2, 512, 1) of torch.float32; expected a matrix"),
    ({"down": torch.ones(2, 64)}, "The down factor is for 64 input features, the input has 512."),
    ({"slices": [8, 12, 0]},
     "1 up factors have 3 numbers for their slices; expected four per factor."),
    ({"slices": [8, 13, 0, 2]}, "A slice has rows 8 to 13 of 12 and ranks 0 to 2 of 2."),
    ({"ups": [torch.ones(3, 2)]},
     "An up factor is (3, 2) of torch.float32, its slice has 4 rows and 2 ranks.")
]
OTHERS_BROKEN = [("embedding", embedding_operands(ids=torch.ones(2)),
                  "The ids are (2,) of torch.float32; expected int64 or int32."),
                 ("embedding", embedding_operands(columns=320),
                  "A row of 320 values is not a multiple of the 256 values in a block of Q4_K."),
                 ("embedding", embedding_operands(dtype=torch.int8),
                  "A weight is dequantized to a float dtype, not to torch.int8."),
                 ("dequantize", dequantize_operands(shape=[ROWS + 1, COLUMNS]),
                  "3456 bytes of Q4_K hold 6144 values, not a weight of 13 x 512."),
                 ("dequantize", dequantize_operands(first=1),
                  "not a weight of 12 x 512 from block 1 on."),
                 ("dequantize", dequantize_operands(dtype=torch.int64),
                  "A weight is dequantized to a float dtype, not to torch.int64.")]
BROKEN = [
    *(("linear", linear_operands(**others), sentence) for others, sentence in BROKEN_LINEAR),
    *OTHERS_BROKEN
]


@pytest.mark.parametrize(
    ("name", "operands", "sentence"), BROKEN,
    ids=[f"{name}: {sentence}" for name, _, sentence in BROKEN]
)
def test_a_fake_says_what_is_wrong(name, operands, sentence):
    with pytest.raises(RuntimeError, match=re.escape(sentence)) as error:
        fake(getattr(torch.ops.featherweight, name), operands)
    assert str(error.value).strip().count("\n") == 0
