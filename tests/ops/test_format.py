"""The base of packed formats: registration and shape algebra."""
import pytest
import torch
from featherweight.ops.format import FORMATS, Format, FormatError, bit_fields, select


def test_second_claim_on_a_ggml_type_is_refused():
    import featherweight.ops.formats  # noqa: F401
    with pytest.raises(TypeError, match="ggml type 8 is claimed by Q8_0 and Impostor"):
        class Impostor(Format, ggml_type=8):
            block_length, block_bytes = 32, 34
    assert "Impostor" not in FORMATS


def test_rows_that_do_not_divide_into_blocks_are_refused():
    import featherweight.ops.formats  # noqa: F401
    with pytest.raises(FormatError, match="blocks of 32"):
        FORMATS["Q8_0"].packed_shape((4, 33))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_bit_fields_equal_shift_and_mask_of_each_byte(width):
    data = torch.arange(256, dtype=torch.uint8).view(64, 4)
    for shift in range(0, 8, width):
        expected = (data.int() >> shift) & ((1 << width) - 1)
        assert torch.equal(bit_fields(data, width, shift).int(), expected)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [0, 1, 45, 4096 * 3, 70_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_select_equals_indexing(threads, length, dtype):
    table = torch.randn(256)
    index = torch.randint(256, (length,)).to(dtype)
    assert torch.equal(select(table, index), table[index.long()])
