"""Packing floats: gguf's or bitsandbytes' own code reads what is written as nearly the same
weights, or exactly as theirs."""
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from kernel_cases import one_of_each_search
from pack_api import FORMATS, FormatError, pack_tensor, packed_tensors
from packing_cases import GRIDS

from devtools.files.gguf_files import block_pool
from featherweight.ops.packing import pack_tensor as quantize
from featherweight.ops.packing.pack_tensor import can_pack
from featherweight.ops.quantize.grid_search import Search

pytestmark = pytest.mark.usefixtures("one_thread")

# Relative error that normal weights may have: a little more than what is measured, less than a
# worse search would leave. In most of them large values count more, which costs a little here.
ERRORS = {
    "Q2_K": 0.274, "Q3_K": 0.148, "Q4_K": 0.0715, "Q5_K": 0.0355, "Q6_K": 0.0178, "IQ4_XS": 0.0765,
    "IQ4_NL": 0.0755, "Q4_0": 0.0835, "Q4_1": 0.071, "Q5_0": 0.0415, "Q5_1": 0.0345, "Q8_0": 0.0055,
    "NF4": 0.0875, "FP4": 0.117
}
each_grid = pytest.mark.parametrize("type_name", one_of_each_search(GRIDS))
REFERENCES = [name for name, packed_format in FORMATS.items()
              if quantize._has_reference(packed_format) and not packed_format.qparams]


def reference_values(packed) -> np.ndarray:
    """The values of a packed tensor by gguf's reference; NF4's by its codebook, of which another
    test has that it is right."""
    packed_format = packed.params.format
    if packed_format.ggml_type is None:
        return packed.dequantize().numpy()
    data = packed._qdata.view(packed_format.packed_shape(packed.shape))
    return gguf.quants.dequantize(data.numpy(), GGMLQuantizationType(packed_format.ggml_type))


def there_and_back(values, type_name, **kwargs) -> np.ndarray:
    return reference_values(pack_tensor(torch.as_tensor(values), FORMATS[type_name], **kwargs))


def error(found, values) -> float:
    return float(
        np.sqrt(
            np.square(found - values).mean(dtype=np.float64) /
            np.square(values).mean(dtype=np.float64)))


def normal(rows=64, columns=512, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * 0.05


@pytest.mark.parametrize("type_name", GRIDS)
def test_normal_weights_keep_their_values(type_name):
    values = normal()
    found = there_and_back(values, type_name)
    assert found.shape == values.shape and error(found, values) < ERRORS[type_name]


@each_grid
def test_each_group_has_its_own_size(type_name):
    """Blocks whose groups differ up to tenfold: the small ones are not lost in the large ones'
    steps."""
    sizes = np.repeat(np.linspace(0.1, 1, 4, dtype=np.float32), 64)
    values = normal(64, 256, 1) * sizes
    found = there_and_back(values, type_name)
    first, last = (error(found[:, part], values[:, part])
                   for part in (slice(0, 64), slice(192, 256)))
    assert first < 2 * ERRORS[type_name] and last < 1.2 * ERRORS[type_name]


@each_grid
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -0.2])
def test_equal_weights_stay_equal(type_name, value):
    found = there_and_back(np.full((2, 256), value, np.float32), type_name)
    assert np.ptp(found) == 0 and found[0, 0] == pytest.approx(value, rel=1e-2, abs=1e-9)


@each_grid
def test_what_lies_on_the_grid_stays_there(type_name):
    """The values of valid blocks, packed again: the search finds codes and scales that are as
    good."""
    packed_format = FORMATS[type_name]
    if packed_format.ggml_type is None:
        values = there_and_back(normal(256), type_name)
    else:
        blocks = block_pool(type_name)[:256]
        values = gguf.quants.dequantize(blocks, GGMLQuantizationType(packed_format.ggml_type))
    found = there_and_back(values, type_name)
    # Of many levels the few random codes of a group do not tell the scale they were made with.
    assert error(found, values) < ERRORS[type_name] / (
        4 if len(packed_format.grid.levels) < 64 else 1.5
    )


@each_grid
def test_columns_that_count_more_are_kept_better(type_name):
    values, importance = normal(), torch.ones(512)
    importance[::2] = 20
    plain, weighted = (
        there_and_back(values, type_name),
        there_and_back(values, type_name, importance=importance),
    )
    assert error(weighted[:, ::2], values[:, ::2]) < 0.97 * error(plain[:, ::2], values[:, ::2])


@each_grid
def test_columns_of_no_importance_keep_their_values(type_name):
    values, importance = normal(), torch.zeros(512)
    importance[100] = 1
    assert error(there_and_back(values, type_name, importance=importance), values) < 0.7


@each_grid
def test_one_outlier_costs_its_group_and_no_other(type_name):
    values = normal(16, 1024)
    values[:, 5] = 3
    found = there_and_back(values, type_name)
    assert np.abs(found[:, 5] - 3).max() < 0.2
    assert error(found[:, 256:], values[:, 256:]) < 1.2 * ERRORS[type_name]


def test_bfloat16_values_beyond_float16_are_kept_or_refused():
    values = torch.tensor([[1.0, 70000.0]])
    assert there_and_back(values.bfloat16(), "BF16").tolist() == [[1.0, 70144.0]]
    with pytest.raises(FormatError, match="F16 holds 65504 at most"):
        pack_tensor(values, FORMATS["F16"])


def test_formats_that_nothing_packs_are_refused():
    assert (
        not can_pack(FORMATS["IQ2_XXS"])
        and can_pack(FORMATS["Q4_K"])
        and can_pack(FORMATS["TQ1_0"])
    )
    for arguments in ({"packed_format": FORMATS["IQ2_XXS"]},
                      {"packed_format": FORMATS["Q4_K"], "reference": True}):
        with pytest.raises(FormatError, match="cannot be packed"):
            pack_tensor(torch.zeros(1, 256), **arguments)
    with pytest.raises(FormatError, match="no plain arithmetic"):
        FORMATS["Q4_K"].pack(torch.zeros(1, 256))


@pytest.mark.parametrize(
    "importance", [torch.ones(5), torch.full((256,), torch.nan), -torch.ones(256)]
)
def test_importance_that_does_not_fit_is_refused(importance):
    with pytest.raises(FormatError, match="Importance"):
        pack_tensor(torch.ones(2, 256), FORMATS["Q4_K"], importance=importance)


def special_values() -> np.ndarray:
    """Rows for references: normal ones, and such as have ties, zeros, outliers, subnormal scales,
    and any magnitude."""
    generator = np.random.default_rng(3)
    rows = [
        normal(40),
        np.round(normal(8) * 100) / 8,
        generator.uniform(-3, 1, (8, 512)),
        np.zeros((1, 512)),
        np.full((1, 512), -0.25),
        normal(4) * 1e-4,
        normal(4) * 1e-6,
        normal(4) * 1e4
    ]
    values = np.concatenate(rows).astype(np.float32)
    values[::7, 3] = 2.5
    values[5, 32:64] = 0
    unit = normal(4) / np.abs(normal(4)).max()
    # where gguf divides by numbers
    sizes = np.float32([1e-35, 1e-30, 1e-22, 1e-15, 1e-8, 1e3, 6e4])
    return np.concatenate([values, *(unit * size for size in sizes)])


@pytest.mark.parametrize("type_name", REFERENCES)
def test_reference_packs_the_bytes_that_gguf_packs(type_name):
    values = special_values()
    packed_format = FORMATS[type_name]
    expected = gguf.quants.quantize(values, GGMLQuantizationType[type_name]).view(np.uint8).reshape(
        len(values), -1)
    packed = pack_tensor(torch.from_numpy(values), packed_format, reference=True)
    found = packed._qdata.view(packed_format.packed_shape(values.shape)).numpy()
    where = np.argwhere(found != expected)
    assert not len(where), f"{len(where)} bytes differ, the first at {where[0]}"


def test_every_type_that_gguf_packs_has_a_reference_here():
    packs = {ggml_type.name for ggml_type, traits in gguf.quants._type_traits.items()
             if "quantize_blocks" in vars(traits)}
    assert packs | {"F16"} == set(REFERENCES)


@pytest.mark.parametrize("shape", [(12, 256), (10, 96), (3, 64)])
@pytest.mark.parametrize("block_length", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reference_packs_what_bitsandbytes_packs(quant_type, block_length, shape):
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values[0, :5] = 0
    # in a last, short block bitsandbytes divides, which rounds otherwise
    whole = values.numel() // block_length * block_length
    data, state = functional.quantize_4bit(values, blocksize=block_length, quant_type=quant_type)
    packed_format = FORMATS[quant_type.upper()].of_block_length(block_length)
    codes, absmax = packed_tensors(pack_tensor(values, packed_format, reference=True))
    assert torch.equal(absmax, state.absmax)
    assert (
        torch.equal(codes[: whole // 2], data.view(-1)[: whole // 2]) and len(codes) == data.numel()
    )


@pytest.mark.parametrize("shape", [(10, 96), (7, 45), (5,), (3, 8, 20)])
@pytest.mark.parametrize("type_name", ["NF4", "FP4"])
def test_formats_of_bitsandbytes_pack_any_shape(type_name, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    importance = torch.rand(shape[-1], generator=torch.Generator().manual_seed(1))
    for kwargs in ({}, {"importance": importance}, {"reference": True}):
        packed = pack_tensor(values, FORMATS[type_name], **kwargs)
        assert packed.shape == values.shape and packed.dtype == torch.float32
        assert error(packed.dequantize().numpy(), values.float().numpy()) < 0.17


@pytest.mark.parametrize("type_name", [name for name in GRIDS if GRIDS[name].grid.scales])
def test_a_group_fits_under_super_scales_that_are_chosen(type_name):
    """What error feedback does: the whole block first, then each group anew, columns rounded by
    hand, and the bytes of all."""
    packed_format, values = FORMATS[type_name], torch.from_numpy(normal(16, 256))
    grid, search = packed_format.grid, Search(packed_format.grid, values.device)
    fit = search.fit(values)
    for group in range(grid.groups):
        part = slice(group * grid.group, (group + 1) * grid.group)
        scale, minimum = search.fit_group(values[:, part], None, fit.d, fit.dmin)
        unit, offset = fit.d * scale, None if minimum is None else fit.dmin * minimum
        levels = search.round(values[:, part], unit, offset)
        fit.scales[:, group:group + 1], fit.codes[:, part] = scale, search.codes(levels)
        if minimum is not None:
            fit.minima[:, group:group + 1] = minimum
        expected = unit * levels - (0 if minimum is None else offset)
        found = packed_format.dequantize(packed_format.encode(fit))[:, part]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)
    found = packed_format.dequantize(packed_format.encode(fit))
    assert error(found.numpy(), values.numpy()) < 1.03 * ERRORS[type_name]


@pytest.mark.parametrize("weighted", [False, True])
def test_emphasis_moves_error_from_large_values_to_small_ones(weighted):
    """Its weights, given as such, are the same search."""
    values, search = (
        torch.from_numpy(normal(32, 256)),
        Search(FORMATS["Q2_K"].grid, torch.device("cpu")),
    )
    given = (
        torch.rand(32, 256, generator=torch.Generator().manual_seed(0))
        if weighted
        else torch.ones(32, 256)
    )
    large = (values.square() + values.square().mean(-1, keepdim=True)).sqrt()
    found, expected = (
        search.fit(values, given if weighted else None, emphasis=True),
        search.fit(values, given * large),
    )
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
