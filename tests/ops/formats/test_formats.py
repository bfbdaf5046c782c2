"""Every packed ggml format against gguf's reference, bit for bit, in float32."""

import numpy as np
import pytest
import torch
from ggml_reference import WITHOUT_REFERENCE, reference
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from pack_api import FORMATS, GGML_FORMATS

from devtools.files import ggml_quantiser
from devtools.files.gguf_files import block_pool
from devtools.files.gguf_types import FORK_TYPES, NEWER_TYPES
from featherweight.ops.formats import base, plain

DEVICES = ["cpu"] + [name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available()]
each_format = pytest.mark.parametrize("fmt", GGML_FORMATS.values(), ids=lambda fmt: fmt.name)

# Q8_1 holds activations during a dot product and is never in a file; gguf-py and ggml disagree
# about its size.
NOT_A_FILE_FORMAT = {"Q8_1"}


def random_blocks(fmt, count: int) -> np.ndarray:
    return np.random.default_rng(fmt.ggml_type).integers(
        0, 256, (count, fmt.block_bytes), dtype=np.uint8
    )


def usual_blocks(fmt, count: int) -> np.ndarray:
    """Blocks with values of a usual size, where gguf can tell."""
    if fmt.name in WITHOUT_REFERENCE:
        return random_blocks(fmt, count)
    return np.resize(block_pool(fmt.name), (count, fmt.block_bytes))


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor):
    """Equal bit patterns, so minus zero is not zero; any NaN equals any NaN."""
    assert values.dtype == expected.dtype and values.shape == expected.shape
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    values = values.cpu()
    same = (values.view(bits) == expected.view(bits)) | (values.isnan() & expected.isnan())
    where = (~same).nonzero()
    assert same.all(), f"{len(where)} values differ, the first at {where[0].tolist()}"


def test_every_packed_type_of_gguf_has_a_format():
    packed = {
        int(ggml_type): ggml_type.name for ggml_type in GGMLQuantizationType
        if GGML_QUANT_SIZES[ggml_type][0] > 1 and ggml_type.name not in NOT_A_FILE_FORMAT |
        FORK_TYPES
    }
    own_types = {
        number: fmt.name for number, fmt in GGML_FORMATS.items()
        if fmt.name not in FORK_TYPES
    }
    assert own_types == packed


@pytest.mark.skipif(
    not ggml_quantiser.available(), reason="llama.cpp's source or a C compiler is missing"
)
@pytest.mark.parametrize("type_name", [*WITHOUT_REFERENCE, *(NEWER_TYPES.keys() - FORK_TYPES)])
def test_what_gguf_lacks_dequantizes_as_in_llama_cpp(type_name):
    blocks = random_blocks(FORMATS[type_name], 1000)
    expected = torch.from_numpy(ggml_quantiser.dequantize(blocks, type_name))
    assert_same_bits(FORMATS[type_name].dequantize(torch.from_numpy(blocks)), expected)


@each_format
def test_block_sizes_are_those_of_gguf(fmt):
    assert (fmt.block_length, fmt.block_bytes) == GGML_QUANT_SIZES[
        GGMLQuantizationType(fmt.ggml_type)
    ]


@pytest.mark.parametrize("device", DEVICES)
@each_format
def test_dequantize_equals_the_reference(fmt, device):
    for blocks in (usual_blocks(fmt, 256), random_blocks(fmt, 1000)):
        assert_same_bits(fmt.dequantize(torch.from_numpy(blocks).to(device)),
                         reference(fmt, blocks))


@each_format
def test_every_code_and_every_bit_lands_where_the_reference_puts_it(fmt):
    size = fmt.block_bytes
    byte = np.arange(256, dtype=np.uint8)[:, None]
    uniform = np.broadcast_to(byte, (256, size))  # all zeros and all ones are among them
    mixed = byte + np.arange(size, dtype=np.uint8) * np.uint8(7)
    single = np.tile(usual_blocks(fmt, 1), (size * 10, 1)).reshape(size, 10, size)
    for position in range(size):
        single[position, :, position] = [0, 255, *(1 << bit for bit in range(8))]
    blocks = np.concatenate([uniform, mixed, single.reshape(-1, size)])
    assert_same_bits(fmt.dequantize(torch.from_numpy(blocks)), reference(fmt, blocks))


@each_format
def test_extreme_scales_equal_the_reference(fmt):
    # float16: zeros, subnormal, maxima, inf, NaN
    extremes = (0x0000, 0x8000, 0x0001, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00)
    blocks = np.tile(usual_blocks(fmt, 1), (fmt.block_bytes - 1, len(extremes), 1))
    for offset in range(fmt.block_bytes - 1):
        blocks[offset, :, offset : offset + 2] = (
            np.array(extremes, dtype="<u2").view(np.uint8).reshape(-1, 2)
        )
    blocks = blocks.reshape(-1, fmt.block_bytes)
    assert_same_bits(fmt.dequantize(torch.from_numpy(blocks)), reference(fmt, blocks))


@each_format
def test_dequantize_takes_many_one_and_no_rows_at_any_address(fmt):
    blocks = random_blocks(fmt, 50)
    wide = torch.zeros(50, fmt.block_bytes + 6, dtype=torch.uint8)
    strided = wide[:, 3:-3]
    strided.copy_(torch.from_numpy(blocks))
    assert_same_bits(fmt.dequantize(strided), reference(fmt, blocks))
    assert_same_bits(fmt.dequantize(strided[7:8]), reference(fmt, blocks[7:8]))
    assert fmt.dequantize(strided[:0]).shape == (0, fmt.block_length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_format
def test_dequantize_into_rounds_once_over_whole_and_partial_chunks(fmt, dtype, monkeypatch):
    monkeypatch.setattr(base, "CPU_CHUNK_VALUES", 1024)
    blocks = usual_blocks(fmt, 2 * 1024 // fmt.block_length + 3).reshape(1, -1)
    out = torch.full((blocks.size // fmt.block_bytes, fmt.block_length), torch.nan, dtype=dtype)
    assert fmt.dequantize_into([torch.from_numpy(blocks)], out) is out
    assert_same_bits(out, reference(fmt, blocks.reshape(-1, fmt.block_bytes)).to(dtype))


@pytest.mark.parametrize("type_name", ["Q2_0", "PQ2_0"])
def test_q2_0_reads_neighbouring_values_from_a_byte_lowest_bits_first(type_name):
    fmt = FORMATS[type_name]
    # d = 0.5
    block = torch.tensor([[0x00, 0x38, 0b11100100, *[0b01010101] * (fmt.block_bytes - 3)]],
                         dtype=torch.uint8)
    expected = torch.zeros(1, fmt.block_length)
    expected[0, :4] = torch.tensor([-0.5, 0, 0.5, 1])
    assert_same_bits(fmt.dequantize(block), expected)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.bfloat16), ("BF16", torch.float16)])
def test_numbers_of_16_bits_are_rounded_once_to_other_16_bits(name, dtype, first, monkeypatch):
    monkeypatch.setattr(plain, "VALUES_AT_ONCE", 1000)
    packed_format = FORMATS[name]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(packed_format.plain_dtype)
    out = torch.empty(len(every) - first, dtype=dtype)
    packed_format.dequantize_into([every.view(torch.uint8)], out, first=first)
    expected = every[first:].float().to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))
