"""Rows of packed weights: moved as bytes, equal to the rows of the dense weight."""
import numpy as np
import pytest
import torch
from pack_api import FORMATS, is_packed, packed_tensor

from devtools.files.gguf_files import pack
from featherweight.ops.tensor.row_slicing import dense, interleave_rows, join_rows, take_rows

bitsandbytes = pytest.importorskip("bitsandbytes")


def weight(format_name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if format_name == "F32":
        return torch.from_numpy(values)
    if format_name == "NF4":
        codes, state = bitsandbytes.functional.quantize_4bit(
            torch.from_numpy(values), quant_type="nf4", blocksize=64
        )
        return packed_tensor(FORMATS["NF4"], codes, shape, scale=state.absmax)
    return packed_tensor(FORMATS[format_name],
                         torch.from_numpy(pack(values.reshape(-1, 256), format_name, seed)), shape)


PACKED = ("Q8_0", "Q4_K", "MXFP4", "NF4")


@pytest.mark.parametrize("index", [slice(2, 5), torch.tensor([5, 0, 3, 3])], ids=["slice", "ids"])
@pytest.mark.parametrize("format_name", [*PACKED, "F32"])
def test_rows_are_taken_packed(format_name, index):
    tensor = weight(format_name, (6, 256))
    taken = take_rows(tensor, index)
    assert is_packed(taken) == is_packed(tensor)
    assert torch.equal(dense(taken), dense(tensor)[index])


@pytest.mark.parametrize("format_name", PACKED)
def test_a_slice_copies_no_bytes(format_name):
    tensor = weight(format_name, (6, 256))
    assert take_rows(tensor, slice(0, 6)) is tensor
    part = take_rows(tensor, slice(2, 5))
    assert part._qdata.untyped_storage().data_ptr() == tensor._qdata.untyped_storage().data_ptr()


@pytest.mark.parametrize("columns", [(256,), (64, 2, 2)], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("format_name", [*PACKED, "F32"])
def test_parts_are_joined_packed(format_name, columns):
    parts = [weight(format_name, (rows, *columns), seed=rows) for rows in (2, 5, 3)]
    joined = join_rows(parts)
    assert is_packed(joined) == is_packed(parts[0])
    assert torch.equal(dense(joined), torch.cat([dense(part) for part in parts]))


@pytest.mark.parametrize("shape", [(4, 256), (3, 4, 256)], ids=str)
@pytest.mark.parametrize("format_name", [*PACKED, "F32"])
def test_rows_of_parts_are_interleaved_packed(format_name, shape):
    parts = [weight(format_name, shape, seed) for seed in (1, 2)]
    woven = interleave_rows(parts)
    assert is_packed(woven) == is_packed(parts[0])
    expected = torch.empty(*shape[:-2], 2 * shape[-2], shape[-1])
    expected[..., ::2, :], expected[..., 1::2, :] = map(dense, parts)
    assert torch.equal(dense(woven), expected)


def test_what_cannot_be_moved_as_bytes_is_dequantized():
    nf4 = weight("NF4", (6, 96))  # blocks of 64 cross rows of 96
    assert torch.equal(take_rows(nf4, slice(1, 3)), dense(nf4)[1:3])
    mixed = [weight("Q8_0", (2, 256)), weight("Q4_K", (2, 256))]
    assert torch.equal(join_rows(mixed), torch.cat([dense(part) for part in mixed]))
    assert torch.equal(interleave_rows(mixed)[::2], dense(mixed[0]))
