"""Codes in tiles and words are repacked in slices, whose memory is bounded."""
import tracemalloc

import pytest
import torch
from pack_api import Format, open_weights
from quantizer_writers import awq
from safetensors.torch import save_file

from featherweight.loaders.quantizers import comfy_quant_formats, gptq, nunchaku_tiles, repack
from featherweight.ops.formats.svdquant import INPUT_SHIFT, SVDQUANT_INT4
from featherweight.ops.tensor import packed_layout


def random_words(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-2**31, 2**31, shape, generator=generator).int()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_permuted_copy_has_the_elements_in_torchs_order(dtype):
    stored = random_words(7, 3, 10)
    shape = (7, 3, 5, -1)
    expected = stored.view(-1).view(dtype).view(shape).permute(2, 0, 3, 1)
    copied = repack.copy_permuted(stored, dtype, shape, (2, 0, 3, 1))
    assert copied.is_contiguous() and torch.equal(copied, expected)


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (64, 64), (200, 3), (3, 200)])
def test_transposed_words_are_those_of_torch(shape):
    words = random_words(*shape)
    transposed = repack.transpose_words(words)
    assert transposed.is_contiguous() and torch.equal(transposed, words.t())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_upper_fields_are_exchanged_with_lower_ones(bits):
    first, second = (random_words(2, 100)[row] for row in range(2))
    mask = sum((1 << bits) - 1 << at for at in range(0, 32, 2 * bits))
    unsigned = [[number & 0xFFFFFFFF for number in row.tolist()] for row in (first, second)]
    expected = [[a & mask | (b & mask) << bits for a, b in zip(*unsigned)],
                [a >> bits & mask | b & mask << bits for a, b in zip(*unsigned)]]
    arrays = [repack.words_of(row).copy() for row in (first, second)]
    repack.exchange_fields(*arrays, bits)
    assert [array.tolist() for array in arrays] == expected


@pytest.mark.parametrize(("rows", "columns", "group"), [
    (8, 8, 8), (8, 2, 2), (64, 36, 12), (24, 520, 4), (2120, 30, 6)])
def test_awqs_columns_may_be_any_even_number(rows, columns, group, tmp_path):
    parts, expected = awq(random_weight(rows, columns), group)
    save_file({f"L.{name}": part.contiguous() for name, part in parts.items()},
              tmp_path / "a.safetensors")
    weight = open_weights(tmp_path / "a.safetensors").state_dict()["L.weight"]
    assert torch.equal(weight.dequantize(), expected)


def random_weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


REPACKED = {
    "SVDQuant": (nunchaku_tiles.codes_in_rows, random_words(2048, 512).view(torch.int8)),
    "AWQ tiles": (nunchaku_tiles.awq_codes_in_rows, random_words(512, 2048)),
    "AWQ words": (gptq._awq_codes, random_words(2048, 512)),
    "GPTQ words": (repack.transpose_words, random_words(2048, 512)),
}


@pytest.mark.parametrize("name", REPACKED)
def test_repacking_takes_a_few_slices_beside_the_result(name):
    unpack, stored = REPACKED[name]
    before = stored.clone()
    unpack(stored[:128])
    tracemalloc.start()
    try:
        unpack(stored)
        peak = tracemalloc.get_traced_memory()[1]  # of NumPy's arrays too
    finally:
        tracemalloc.stop()
    assert stored.nbytes <= peak < stored.nbytes + 3 * repack.SLICE_BYTES
    assert torch.equal(stored, before)


def test_mapped_words_are_read_only_for_numpy():
    words = repack.words_of(random_words(8))
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 0


def test_the_bias_of_a_shift_is_summed_in_slices(monkeypatch):
    rows, columns = 640, 4096
    main = packed_layout.packed_rows(
        SVDQUANT_INT4, random_words(rows, columns // 8).view(torch.uint8), (rows, columns),
        scale=torch.rand(rows, columns // 64).bfloat16(), row_scale=torch.rand(rows),
        column_scale=torch.rand(columns))
    expected = main.dequantize().sum(1) * INPUT_SHIFT
    sizes, dequantize_into = [], Format.dequantize_into

    def record(packed_format, tensors, out, *args, **kwargs):
        sizes.append(out.numel())
        return dequantize_into(packed_format, tensors, out, *args, **kwargs)

    monkeypatch.setattr(Format, "dequantize_into", record)
    assert torch.equal(comfy_quant_formats.bias_of_shift(main), expected)
    assert sum(sizes) == rows * columns and max(sizes) <= comfy_quant_formats.SLICE_VALUES


def test_factors_without_scales_are_not_copied_in_float32():
    up, down = (torch.rand(size).bfloat16() for size in ((256, 16), (16, 128)))
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = packed_layout._within_float16(up, down, None)
    assert kept == (up, down)
    assert max(event.cpu_memory_usage for event in profile.events()) <= up.nbytes
