"""Weights that are made of weights in other formats: a low rank added, parts joined."""
import gc
import pickle
import random

import pytest
import torch
from host_patches import patched_by_host
from pack_api import (
    FORMATS,
    Format,
    FormatError,
    is_packed,
    join_packed,
    packed_operations,
    packed_tensor,
    packed_tensors,
    product,
    random_tensors,
    with_low_rank,
)
from patched_layers import plain_lora, with_patches

from featherweight.ops import kernels
from featherweight.ops.formats._names import format_named
from featherweight.ops.formats.column_groups import ColumnGroups, TapsFirst
from featherweight.ops.formats.comfy_quant import INT8_GROUPS, INT8_ROWS, SMOOTHED
from featherweight.ops.formats.low_rank_and_joined import Composite
from featherweight.ops.formats.svdquant import SVDQUANT_INT4
from featherweight.ops.low_rank import LowRank
from featherweight.ops.tensor.packed_layout import PickledWeight, scale_packed, with_input_shift
from featherweight.ops.tensor.packed_tensor import relabel
from featherweight.ops.tensor.row_slicing import join_rows, take_rows

CPU = torch.device("cpu")
COLUMNS = 512


def random_weight(packed_format, rows=24, columns=COLUMNS):
    blocks = rows * columns // packed_format.block_length
    data, *sides = random_tensors(packed_format, blocks, CPU, bounded=True)
    return packed_tensor(packed_format, data, (rows, columns), torch.float32, *sides)


def factors(rows, rank=5, columns=COLUMNS, dtype=torch.bfloat16):
    return torch.randn(rows, rank).to(dtype), torch.randn(rank, columns).to(dtype) / 30


def ranked(packed_format, rows=24, columns=COLUMNS, rank=5, dtype=torch.bfloat16):
    return with_low_rank(random_weight(packed_format, rows, columns),
                         *factors(rows, rank, columns, dtype))


def parts_of_rows():
    """Weights of formats whose sides differ, two with a low rank."""
    return [ranked(INT8_ROWS.of_columns(COLUMNS), 24), random_weight(FORMATS["Q4_K"], 8),
            ranked(SMOOTHED["NVFP4_ROWS"].of_columns(COLUMNS), 16, rank=3, dtype=torch.float32),
            random_weight(FORMATS["F16"], 8)]


def joined(axis):
    if axis == 0:
        return join_packed(parts_of_rows(), 0)
    return join_packed([ranked(INT8_GROUPS.of_columns(256), 24, 256),
                        ranked(INT8_ROWS.of_columns(128), 24, 128),
                        random_weight(FORMATS["Q8_0"], 24, 64)], 1)


def assert_same(values, expected, relative=1e-6):
    """A sum over ranks depends in its last bit on how many rows are multiplied at once."""
    torch.testing.assert_close(values, expected, rtol=relative, atol=1e-5)


def scaled():
    weight = random_weight(INT8_ROWS.of_columns(COLUMNS))
    return with_low_rank(weight, *factors(24), (torch.rand(24), torch.rand(COLUMNS)))


def times(base="Q4_K", by_column=False):
    packed_format = FORMATS[base] if base in FORMATS else INT8_GROUPS.of_columns(COLUMNS, 64)
    return scale_packed(random_weight(packed_format), torch.randn(24),
                        torch.rand(COLUMNS) + 0.5 if by_column else None)


WEIGHTS = {"times": times, "times columns": lambda: times("NF4", True),
           "times of rows": lambda: times("int8"), "times halves": lambda: times("F16"),
           "scaled low rank": scaled, "low rank": lambda: ranked(INT8_ROWS.of_columns(COLUMNS)),
           "rows": lambda: joined(0), "columns": lambda: joined(1)}
every_weight = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)


def shifted():
    columns = 128  # whole groups and padding
    weight = with_low_rank(random_weight(SVDQUANT_INT4.of_columns(columns, 64), 128, columns),
                           *factors(128, 16, columns))
    return with_input_shift(weight, torch.randn(128))


def taps_first():
    weight = random_weight(INT8_ROWS.of_columns(COLUMNS))
    packed_format = TapsFirst.of(weight.params.format, 4)
    return packed_tensor(packed_format, *packed_tensors(weight)[:1], weight.shape, torch.float32,
                         *packed_tensors(weight)[1:])


def column_groups():
    packed_format = ColumnGroups.of(FORMATS["Q8_0"], COLUMNS, 2, 4)
    return packed_tensor(packed_format, random_weight(FORMATS["Q8_0"])._qdata, (24, COLUMNS),
                         torch.float32)


# those within others too
NESTED = {"shifted": shifted, "taps first": taps_first,
          "column groups": column_groups,
          "rows of shifted": lambda: join_packed([shifted(), shifted()], 0),
          "rows of columns": lambda: join_packed([joined(1), ranked(
              INT8_ROWS.of_columns(joined(1).shape[1]), 8, joined(1).shape[1])], 0)}
nested_too = pytest.mark.parametrize("make", (WEIGHTS | NESTED).values(), ids=WEIGHTS | NESTED)


pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_low_rank_is_part_of_the_values(dtype, is_scaled):
    base, (up, down) = random_weight(INT8_ROWS.of_columns(COLUMNS)), factors(24)
    scales = (torch.rand(24), torch.rand(COLUMNS)) if is_scaled else None
    weight = with_low_rank(base, up, down, scales)
    product_of_factors = up.float() @ down.float()
    if is_scaled:
        product_of_factors *= scales[0][:, None] * scales[1]
    else:
        assert weight.nbytes == base.nbytes + up.nbytes + down.nbytes
    torch.testing.assert_close(weight.dequantize(), base.dequantize() + product_of_factors,
                               rtol=1e-6, atol=1e-5)
    assert torch.equal(product.dequantize(weight, dtype), weight.dequantize().to(dtype))


def test_factors_that_do_not_fit_are_refused():
    base, (up, down) = random_weight(INT8_ROWS.of_columns(COLUMNS)), factors(24)
    for wrong in ((up[1:], down), (up, down[1:]), (up, down[:, 1:]), (up[0], down)):
        with pytest.raises(FormatError, match="factors of"):
            with_low_rank(base, *wrong)


def test_joined_rows_have_the_values_of_their_parts():
    parts = parts_of_rows()
    weight = join_rows(parts)
    assert is_packed(weight) and weight.nbytes <= sum(part.nbytes for part in parts) + 1000
    assert torch.equal(weight.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_rows_that_follow_each_other_in_memory_are_joined_without_a_copy():
    weight = ranked(INT8_ROWS.of_columns(COLUMNS))
    joined = join_rows([take_rows(weight, rows) for rows in (slice(0, 8), slice(8, 24))])
    assert is_packed(joined) and joined.params.format is weight.params.format
    assert joined._qdata.data_ptr() == weight._qdata.data_ptr()
    assert torch.equal(joined.dequantize(), weight.dequantize())
    turned = join_rows([take_rows(weight, rows) for rows in (slice(8, 24), slice(0, 8))])
    assert torch.equal(turned.dequantize(), weight.dequantize().roll(-8, 0))


def test_neighbours_of_one_format_are_one_part_of_joined_rows():
    weight, other = ranked(INT8_ROWS.of_columns(COLUMNS)), random_weight(FORMATS["Q4_K"], 8)
    joined = join_rows([*(take_rows(weight, slice(row, row + 8)) for row in (0, 8, 16)), other])
    assert [part.rows for part in joined.params.format.parts] == [24, 8]
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize(), other.dequantize()]))


def test_joined_columns_have_the_values_of_their_parts():
    parts = [ranked(INT8_ROWS.of_columns(128), 24, 128),
             ranked(INT8_GROUPS.of_columns(256), 24, 256)]
    weight = join_packed(parts, 1)
    assert_same(weight.dequantize(), torch.cat([part.dequantize() for part in parts], 1))


@every_weight
@pytest.mark.parametrize(("first", "count"), [(0, 5), (7, 1), (20, 4), (3, 21)])
def test_any_rows_are_dequantised_by_themselves(make, first, count):
    weight = make()
    out = torch.empty(count, weight.shape[1], dtype=torch.bfloat16)
    kernels.dequantize_into(weight.params.format, packed_tensors(weight), out, first)
    assert_same(out, weight.dequantize()[first:first + count].bfloat16(), 2**-8)


@every_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_product_is_that_of_the_values(make, dtype, has_lora, tokens):
    weight, input = make(), torch.randn(tokens, make().shape[1], dtype=torch.float64)
    rows = weight.shape[0]
    up, down = factors(rows - 4, 2, weight.shape[1], torch.float32)
    lora = LowRank.from_factors([(up, down, (4, rows))], rows, dtype) if has_lora else None
    values, bias = weight.dequantize().double(), torch.randn(rows)
    if has_lora:
        values[4:] += up.double() @ down.double()
    expected = input @ values.t() + bias.double()
    out = product.linear(input.to(dtype), weight, bias.to(dtype), lora)
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error < (2e-6 if dtype == torch.float32 else 8e-3)


@every_weight
def test_a_weak_lora_keeps_its_gain_beside_the_weights_own_low_rank(make):
    weight = make()
    rows, columns = weight.shape
    input = torch.randn(512, columns).bfloat16()
    up, down = (factor.float() for factor in factors(rows, 4, columns))
    without = product.linear(input, weight).double()
    up *= 0.005 * without.norm() / (input.double() @ (up @ down).double().t()).norm()
    lora = LowRank.from_factors([(up, down, (0, rows))], rows, torch.bfloat16)
    change = product.linear(input, weight, None, lora).double() - without
    wanted = input.double() @ (up @ down).double().t()
    assert 0.98 < ((change * wanted).sum() / wanted.square().sum()).item() < 1.02


@every_weight
def test_integer_products_take_the_low_rank_as_a_branch(make):
    weight = make()
    input = torch.randn(64, weight.shape[1])
    expected = input @ weight.dequantize().t()
    out = product.linear(input, weight, fast=True)
    assert ((out - expected).norm() / expected.norm()).item() < 2e-2


@every_weight
def test_a_weight_is_found_by_the_name_of_its_format(make):
    packed_format = make().params.format
    name = packed_format.name
    del FORMATS[name]
    again = format_named(name)
    assert (again.block_length, again.block_bytes, again.qparams) == (
        packed_format.block_length, packed_format.block_bytes, packed_format.qparams)
    assert list(map(str, again.formats_within())) == list(map(str, packed_format.formats_within()))


@nested_too
def test_a_weight_survives_pickling(make):
    weight = make()
    again = pickle.loads(pickle.dumps(PickledWeight(torch.nn.Parameter(
        weight, requires_grad=False))))
    assert is_packed(again) and torch.equal(again.dequantize(), weight.dequantize())
    if weight.params.input_shift is not None:
        assert torch.equal(again.params.input_shift, weight.params.input_shift)


def test_rows_of_a_weight_with_a_low_rank_stay_packed_and_those_of_a_joined_one_do_not():
    weight = ranked(INT8_ROWS.of_columns(COLUMNS))
    for part in (take_rows(weight, slice(3, 9)), take_rows(weight, torch.tensor([5, 1]))):
        assert is_packed(part)
    assert_same(take_rows(weight, slice(3, 9)).dequantize(), weight.dequantize()[3:9])
    whole = joined(0)
    assert torch.equal(take_rows(whole, slice(3, 30)), whole.dequantize()[3:30])


@every_weight
def test_rows_of_an_embedding_are_looked_up(make):
    weight, ids = make(), torch.tensor([[3, 0], [20, 3]])
    rows = product.embedding(ids, weight, torch.bfloat16)
    assert_same(rows, weight.dequantize()[ids].bfloat16(), 2**-8)


@every_weight
def test_an_input_gets_the_gradient_of_the_values(make):
    weight = make()
    input = torch.randn(7, weight.shape[1], requires_grad=True)
    (product.linear(input, weight) * torch.linspace(-1, 1, weight.shape[0])).sum().backward()
    expected = torch.linspace(-1, 1, weight.shape[0]).expand(7, -1) @ weight.dequantize()
    torch.testing.assert_close(input.grad, expected, rtol=1e-5, atol=1e-4)


@every_weight
def test_a_compiled_product_has_no_graph_break(make):
    weight, input = make(), torch.randn(3, make().shape[1])

    def run(input):
        return product.linear(input, weight) * 2

    with torch.inference_mode():
        compiled = torch.compile(run, backend="eager", fullgraph=True)(input)
        assert_same(compiled, run(input))


def test_every_format_made_of_others_is_tried():
    formats = {type(make().params.format) for make in (WEIGHTS | NESTED).values()}
    assert formats == set(Composite.__subclasses__())


@nested_too
@pytest.mark.parametrize("fast", [False, True])
def test_products_leave_nothing_behind(make, fast):
    weight = make()
    input = torch.randn(3, weight.shape[1])

    def count() -> tuple[int, int]:
        gc.collect()
        return (len(kernels._found),
                sum(isinstance(thing, Format) for thing in gc.get_objects()))

    product.linear(input, weight, fast=fast)
    before = count()
    for _ in range(100):
        product.linear(input, weight, fast=fast)
    assert count() <= before


# --- torch's cat and split, by which the host joins and parts weights ---

def random_part(rng, columns=COLUMNS):
    """A weight of random rows, in a random format, perhaps of several."""
    rows = rng.randint(1, 24)
    make = rng.choice([
        lambda: random_weight(FORMATS[rng.choice(["Q4_K", "Q8_0", "F16", "BF16"])], rows, columns),
        lambda: random_weight(INT8_ROWS.of_columns(columns), rows, columns),
        lambda: ranked(SMOOTHED["NVFP4_ROWS"].of_columns(columns), rows, columns,
                       rng.randint(1, 6)),
        lambda: join_packed([random_weight(FORMATS["Q8_0"], rows, columns),
                             ranked(INT8_ROWS.of_columns(columns), 3, columns)], 0),
        lambda: relabel(random_weight(FORMATS["Q6_K"], rows, columns), dtype=torch.float32)])
    return make()


def random_sizes(rng, count):
    ends = sorted({count, *(rng.randint(1, count) for _ in range(3))})
    return [end - start for start, end in zip([0, *ends], ends)]


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@MODES
@pytest.mark.parametrize("seed", range(12))
def test_rows_joined_and_parted_by_torch_stay_packed(seed, mode):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with mode():
        parts = [random_part(rng) for _ in range(rng.randint(2, 4))]
        expected = torch.cat([part.dequantize() for part in parts])
        weight = torch.cat(parts, rng.choice([0, -2]))
        assert is_packed(weight) and weight.nbytes < expected.nbytes
        assert_same(weight.dequantize(), expected)
        sizes, size = random_sizes(rng, len(weight)), rng.randint(1, len(weight))
        for ours, theirs in [(weight.split(sizes), expected.split(sizes)),
                             (weight.split(size), expected.split(size)),
                             (torch.split(weight, size, -2), expected.split(size)),
                             (weight.chunk(3), expected.chunk(3))]:
            assert len(ours) == len(theirs) and all(map(is_packed, ours))
            for part, values in zip(ours, theirs):
                assert_same(part.dequantize(), values)
            assert_same(torch.cat(ours).dequantize(), expected)


@MODES
def test_what_is_not_joined_by_rows_is_dense(mode):
    with mode():
        weight = random_weight(FORMATS["Q8_0"])
        values = weight.dequantize()
        for given in ([weight, weight.half()], [weight, torch.ones(2, COLUMNS)],
                      [weight, weight.t()[:, :COLUMNS].t()]):
            dense = torch.cat(given)
            assert not is_packed(dense)
            assert torch.equal(dense, torch.cat([
                part.dequantize() if is_packed(part) else part for part in given]))
        assert torch.equal(torch.cat([weight, weight], 1), torch.cat([values, values], 1))
        assert all(map(torch.equal, weight.chunk(2, 1), values.chunk(2, 1)))


@pytest.mark.parametrize("seed", range(4))
def test_loras_on_the_parts_and_on_the_whole_of_a_joined_weight_are_exact(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parts = [random_part(rng) for _ in range(3)]
    weight = torch.cat(parts)
    layer = packed_operations().Linear(COLUMNS, len(weight), bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    patches, start = [], 0
    for part in [*parts, weight]:
        offset = None if part is weight else (0, start, len(part))
        patches.append((0.06, plain_lora(len(part), COLUMNS), 1.0, offset, None))
        start += len(part)
    with_patches(layer, patches)
    assert layer.lora.low_rank is not None and not layer.lora.weight_patches
    values = patched_by_host(patches, weight.dequantize())
    input = torch.randn(5, COLUMNS)
    with torch.no_grad():
        out, expected = layer(input), torch.nn.functional.linear(input, values)
    assert (out - expected).norm() < 2e-6 * expected.norm()


# --- factors whose numbers lie far apart ---

@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1, 1e6])
def test_low_ranks_of_two_dtypes_are_joined_without_a_loss(dtypes, magnitude):
    parts = []
    for dtype in dtypes:
        up, down = factors(24, dtype=torch.float32)
        scale = magnitude if dtype == torch.bfloat16 else 1  # float16 cannot hold it
        parts.append(with_low_rank(random_weight(INT8_ROWS.of_columns(COLUMNS)),
                                   (up * scale).to(dtype), (down / scale).to(dtype)))
    expected = torch.cat([part.dequantize() for part in parts])
    weight, input = join_packed(parts, 0), torch.randn(3, COLUMNS)
    torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-6, atol=1e-6)
    out = product.linear(input, weight)
    assert (out - input @ expected.t()).norm() < 1e-5 * out.norm()


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("magnitude", [1e-5, 1e5])
def test_a_low_rank_runs_in_float16_whatever_its_factors_share_out(magnitude, is_scaled):
    up, down = factors(24, dtype=torch.float32)
    scales = (torch.rand(24) + 0.5, torch.rand(COLUMNS) + 0.5) if is_scaled else None
    weight = with_low_rank(random_weight(INT8_ROWS.of_columns(COLUMNS)), up * magnitude,
                           down / magnitude, scales)
    input = torch.randn(3, COLUMNS) / 8
    expected = input @ weight.dequantize().t()
    out = product.linear(input.half(), weight).float()
    assert out.isfinite().all() and (out - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_rows", [(), (1,), (24,), (24, 1)])
@pytest.mark.parametrize("base", ["Q4_K", "NF4", "F16"])
def test_factors_beside_a_weight_are_part_of_its_values(base, of_rows, dtype):
    weight, rows, columns = random_weight(FORMATS[base]), torch.randn(of_rows), torch.rand(COLUMNS)
    expected = weight.dequantize() * rows.view(-1, 1)
    assert torch.equal(product.dequantize(scale_packed(weight, rows), dtype), expected.to(dtype))
    both = scale_packed(weight, rows, columns).dequantize()
    assert torch.equal(both, expected * columns)
    part = take_rows(scale_packed(weight, rows), slice(5, 9))
    assert is_packed(part) and torch.equal(part.dequantize(), expected[5:9])


def test_numbers_that_do_not_scale_a_weight_are_refused():
    weight = random_weight(FORMATS["Q4_K"])
    with pytest.raises(FormatError, match="do not scale"):
        scale_packed(weight, torch.ones(23))
    with pytest.raises(FormatError, match="do not scale"):
        scale_packed(weight, torch.ones(()), torch.ones(3))
    blocks = packed_tensor(FORMATS["Q4_K"], weight._qdata, (48, COLUMNS // 2 - 128 + 128),
                           torch.float32)
    with pytest.raises(FormatError, match="not whole blocks"):
        scale_packed(relabel(blocks, shape=(96, 128)), torch.ones(()))
