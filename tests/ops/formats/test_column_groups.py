"""Packed rows whose groups of columns come in another order."""
import gguf
import numpy as np
import pytest
import torch
from pack_api import FORMATS, packed_tensor, product, random_tensors

from devtools.files.gguf_files import pack
from featherweight.ops import kernels
from featherweight.ops.formats.column_groups import ColumnGroups

ROWS, OUTER, INNER, WIDTH = 300, 3, 2, 128
COLUMNS = OUTER * INNER * WIDTH


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_values_are_those_of_the_packed_rows_in_the_new_order(name):
    data = pack(np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32), name)
    values = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))
    expected = values.unflatten(1, (OUTER, INNER, WIDTH)).transpose(1, 2).flatten(1)
    reordered = ColumnGroups.of(FORMATS[name], COLUMNS, OUTER, INNER)
    weight = packed_tensor(reordered, torch.from_numpy(data), (ROWS, COLUMNS))
    assert torch.equal(product.dequantize(weight, torch.float32), expected)
    input = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product.linear(input, weight), input @ expected.t())
    ids = torch.tensor([[7, 0], [ROWS - 1, 7]])
    assert torch.equal(product.embedding(ids, weight, torch.float32), expected[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_are_dequantised_by_a_kernel_of_the_packed_format(dtype, monkeypatch):
    packed_format, rows = FORMATS["Q4_K"], 7
    reordered = ColumnGroups.of(packed_format, COLUMNS, OUTER, INNER)
    tensors = random_tensors(packed_format, rows * COLUMNS // 256, torch.device("cpu"),
                             bounded=True)
    runs = []

    def run(base, *arguments):
        runs.append(base)
        base.dequantize_into(*arguments)

    def find(capability, device, base, dtype, *_):
        return run if (capability, base) == ("dequantize", packed_format) else None

    expected = packed_format.dequantize_into(tensors, torch.empty(rows, COLUMNS, dtype=dtype))
    expected = expected.unflatten(1, (OUTER, INNER, WIDTH)).transpose(1, 2).flatten(1)[2:]
    monkeypatch.setattr(kernels, "find", find)
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES", 2 * COLUMNS)
    values = kernels.dequantize_into(reordered, tensors, torch.empty_like(expected), first=2)
    assert torch.equal(values, expected)
    assert runs == 3 * [packed_format]  # two rows at a time


def test_one_order_of_one_format_is_one_format():
    first = ColumnGroups.of(FORMATS["Q4_K"], COLUMNS, OUTER, INNER)
    assert first is ColumnGroups.of(FORMATS["Q4_K"], COLUMNS, OUTER, INNER)
    assert first is not ColumnGroups.of(FORMATS["Q4_K"], COLUMNS, INNER, OUTER)
