"""Fields of bytes and what is computed from them: the way of a CPU and the way of other devices
give the same bits."""
import numpy as np
import pytest
import torch
from kernel_cases import BASIC_FORMATS, USUAL_ROWS, row_format
from pack_api import FORMATS, random_tensors

from devtools.files.gguf_files import block_pool
from featherweight.ops.formats import bits
from featherweight.ops.formats.bits import bit_planes, half, reinterpret, select, split_bits
from featherweight.ops.formats.column_groups import ColumnGroups
from featherweight.ops.formats.row_layout import FAMILIES

CPU = torch.device("cpu")
EACH = [
    *BASIC_FORMATS, *USUAL_ROWS, ColumnGroups.of(FORMATS["Q4_K"], 512, 4, 2),
    ColumnGroups.of(FORMATS["Q8_0"], 64, 2, 2)]
# of rows with other numbers in the same places, computed in the same way
MORE = [fmt for fmt in map(row_format, FAMILIES) if fmt not in USUAL_ROWS]
each_format = pytest.mark.parametrize("fmt", [
    *EACH, *(pytest.param(fmt, marks=pytest.mark.heavy) for fmt in MORE)],
    ids=lambda fmt: fmt.name)


@pytest.fixture
def as_elsewhere(monkeypatch):
    """A function that makes a CPU take the way of other devices from then on."""
    return lambda: monkeypatch.setattr(bits, "passes_are_cheap", lambda device: False)


def usual_and_random(fmt) -> list[torch.Tensor]:
    """What a weight holds: values of a usual size where gguf can tell, and all that bytes can say,
    infinite scales too."""
    tensors = random_tensors(fmt, 64, CPU)
    if fmt.ggml_type is None:
        return tensors
    every = np.random.default_rng(fmt.ggml_type).integers(
        0, 256, (64, fmt.block_bytes), dtype=np.uint8
    )
    try:
        every = np.concatenate([every, np.resize(block_pool(fmt.name), every.shape)])
    except NotImplementedError:
        pass  # types of which gguf knows the sizes only
    return [torch.cat([tensors[0], torch.from_numpy(every)])]


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    width = {4: torch.int32, 2: torch.int16}[found.dtype.itemsize]
    return bool(
        ((found.view(width) == expected.view(width)) | (found.isnan() & expected.isnan())).all())


@each_format
def test_values_are_the_same_by_few_passes_as_by_cheap_ones_and_nothing_is_written_to(
        fmt, as_elsewhere, monkeypatch):
    monkeypatch.setattr("featherweight.ops.formats.base.CPU_CHUNK_VALUES", 24 * fmt.block_length)
    tensors = usual_and_random(fmt)
    before = [tensor.clone() for tensor in tensors]
    first, blocks = 3, tensors[0].numel() // fmt.block_bytes
    # a composite is dequantised by whole rows
    left_out = 5 if fmt.block_length > 5 and not isinstance(fmt, ColumnGroups) else 0
    values = fmt.dequantize(*fmt.blocks(tensors, first, blocks)).view(-1)
    values = values[:len(values) - left_out]
    for _ in ("here", "elsewhere"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = torch.full_like(values, torch.nan, dtype=dtype)
            fmt.dequantize_into(tensors, found, first)
            assert same_bits(found, values.to(dtype)), dtype
        as_elsewhere()
    assert all(map(torch.equal, tensors, before))


@each_format
def test_bytes_at_any_address_are_dequantized_by_few_passes(fmt, as_elsewhere):
    tensors = usual_and_random(fmt)
    values = tensors[0].numel() // fmt.block_bytes * fmt.block_length
    expected = fmt.dequantize_into(tensors, torch.empty(values))
    as_elsewhere()
    for odd in (2, 4) if fmt.plain_dtype else (1, 2):  # plain numbers lie at even addresses
        moved = torch.empty(tensors[0].numel() + odd, dtype=torch.uint8)[odd:]
        moved = moved.view(tensors[0].shape).copy_(tensors[0])
        found = fmt.dequantize_into([moved, *tensors[1:]], torch.empty(values))
        assert same_bits(found, expected), odd


@pytest.mark.parametrize("everywhere", [False, True], ids=["CPU", "elsewhere"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_bit_planes_equal_shift_and_mask_of_each_byte(width, everywhere, as_elsewhere):
    if everywhere:
        as_elsewhere()
    for data in (torch.arange(256, dtype=torch.uint8).view(32, 8),
                 torch.arange(256, dtype=torch.uint8).view(16, 16)[:, 3:11]):
        planes = bit_planes(data, width)
        assert planes.shape == (len(data), 8 // width, 8) and planes.dtype == torch.uint8
        for index in range(8 // width):
            assert torch.equal(planes[:, index].int(),
                               data.int() >> width * index & (1 << width) - 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_split_bits_takes_words_of_any_size(dtype):
    words = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (50, 3)).to(dtype)
    fields = split_bits(words, 2, 4)
    assert fields.dtype == torch.int32 and fields.shape == (50, 3, 4)
    for index in range(4):
        assert torch.equal(fields[..., index], words.int() >> 2 * index & 3)


@pytest.mark.parametrize(("row_bytes", "start"), [(8, 0), (8, 4), (8, 2), (6, 0), (7, 1)])
def test_numbers_are_a_view_of_their_bytes_only_where_each_may_be_read_where_it_lies(
        row_bytes, start):
    data = torch.arange(70, dtype=torch.uint8)[start : start + 8 * row_bytes].view(8, row_bytes)[
        :, :4
    ]
    numbers = reinterpret(data, torch.int32)
    assert torch.equal(numbers, data.clone().view(torch.int32))
    shared = numbers.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
    assert shared == (row_bytes % 4 == 0 and start % 4 == 0)


def test_neighbouring_scales_are_read_together():
    blocks = torch.randint(0, 60, (9, 21), dtype=torch.uint8)
    assert torch.equal(half(blocks, 3, 2), torch.cat([half(blocks, 3), half(blocks, 5)], 1))


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
