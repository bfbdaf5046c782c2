"""Packing with error feedback: what it gains, and that it is safe with any moments."""
import contextlib
import functools

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from kernel_cases import Largest, cpu_kernels, shared_cache

from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS, FormatError
from featherweight.ops.packing.error_feedback import pack_with_feedback
from featherweight.ops.packing.method_choice import output_errors, pick_lower_error
from featherweight.ops.packing.pack_tensor import pack_tensor
from featherweight.ops.quantize import column_order, damped_hessian
from featherweight.ops.quantize.second_moments import SecondMoments

# Not those of other block lengths, which other tests have made meanwhile.
WITH_GRID = {name: fmt for name, fmt in FORMATS.items() if fmt.grid and fmt.block_length <= 256}
Q4_K = FORMATS["Q4_K"]
# integers with scales and without, plain and with minima, and a codebook
FORMAT_SAMPLE = [FORMATS[name] for name in ("Q3_K", "Q4_K", "Q8_0", "NF4")]
some_formats = pytest.mark.parametrize("fmt", FORMAT_SAMPLE, ids=lambda fmt: fmt.name)
each_format = pytest.mark.parametrize("fmt", [  # for each a kernel is compiled
    pytest.param(fmt, id=name, marks=() if fmt in FORMAT_SAMPLE else pytest.mark.heavy)
    for name, fmt in WITH_GRID.items()])
pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module", params=["torch", "kernel"], autouse=True)
def by(request, tmp_path_factory):
    """What goes through the columns: all here holds for both."""
    with contextlib.ExitStack() as stack:
        if request.param == "kernel":
            patch, find = (
                stack.enter_context(cpu_kernels(shared_cache(tmp_path_factory))),
                kernels.find,
            )
            patch.setattr(
                kernels, "find", lambda op, *case, **more: find(op, *case, **more)
                if op == "pack_columns" else None)
        yield request.param


@functools.cache
def mix_of(columns: int) -> torch.Tensor:
    """An orthogonal matrix."""
    return torch.linalg.qr(torch.randn(columns, columns,
                                       generator=torch.Generator().manual_seed(99)))[0]


@functools.cache
def inputs(tokens: int, columns: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    """Inputs whose spectrum falls as that of trained layers does. Shared by tests: change copies
    only."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, columns, generator=generator)
        * torch.arange(1, columns + 1) ** -power
        @ mix_of(columns)
    )


def weight_of(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 50


def moments_of(tokens: torch.Tensor, block: int | None = None) -> SecondMoments:
    moments = SecondMoments.zeros(tokens.shape[-1], block)
    half = len(tokens) // 2
    moments.add(tokens[:half], hold_out=False)
    moments.add(tokens[half:], hold_out=True)
    return moments


def output_error(weight, packed, tokens) -> float:
    return float(((packed.dequantize() - weight) @ tokens.T).square().sum() /
                 (weight @ tokens.T).square().sum())


def assert_alike(weight, packed, other, tokens):
    """Equal but for codes that sums in another order round to the other side, and what follows from
    those."""
    values, others = packed.dequantize(), other.dequantize()
    assert values.isclose(others, rtol=1e-4).float().mean() > 0.3
    assert output_error(weight, packed, tokens) == pytest.approx(
        output_error(weight, other, tokens), rel=0.1
    )
    differences = (values - others).square().sum(1)
    assert (differences < 3 * (values - weight).square().sum(1)).all()


@pytest.mark.parametrize("block", [None, 256], ids=["all columns", "blocks of 256"])
@each_format
def test_the_output_is_nearer_than_with_the_same_importance_per_column(block, fmt):
    weight, tokens = weight_of(40, 512), inputs(2000, 512)
    moments = moments_of(tokens, block)
    plain = pack_tensor(weight, fmt, importance=moments.importance)
    packed = pack_with_feedback(weight, fmt, moments)
    assert (
        packed.shape == weight.shape
        and packed.dtype == torch.float32
        and packed.nbytes == plain.nbytes
    )
    gain = output_error(weight, plain, tokens[1000:]) / output_error(weight, packed, tokens[1000:])
    assert gain > (1.4 if block else 2)


@pytest.mark.parametrize("period", [32, 256], ids=["groups", "blocks"])
@pytest.mark.parametrize("sweeps", [0, 1])
def test_errors_are_taken_up_by_columns_of_later_groups_and_blocks(period, sweeps, monkeypatch):
    """Inputs that repeat: nearly all of an error can be taken up by the columns that go along with
    its own."""
    monkeypatch.setattr(column_order, "SWEEPS", sweeps)
    weight, tokens = weight_of(32, 512), inputs(900, period).repeat(1, 512 // period)
    moments = moments_of(tokens)
    plain = output_error(weight, pack_tensor(weight, Q4_K, importance=moments.importance), tokens)
    assert (
        output_error(weight, pack_with_feedback(weight, Q4_K, moments), tokens)
        < 0.1 * plain
    )


@each_format
def test_what_the_kernel_chooses_is_what_torch_chooses_but_for_ties(fmt, by, monkeypatch):
    if by == "torch":
        pytest.skip("is compared with")
    weight, tokens = weight_of(1000, 512), inputs(2000, 512)
    moments = moments_of(tokens, 256)
    packed = pack_with_feedback(weight, fmt, moments).dequantize()
    assert kernels.find("pack_columns", weight.device, fmt, torch.float32) is not None
    monkeypatch.setattr(kernels, "find", lambda *case: None)
    expected = pack_with_feedback(weight, fmt, moments).dequantize()
    losses = [0.0, 0.0]
    for index, span in enumerate(moments.spans()):
        of_inputs = damped_hessian.DampedHessian(moments, index, "cpu").moments
        for which, values in enumerate((packed, expected)):
            off = values[:, span] - weight[:, span]
            losses[which] += float(((off @ of_inputs) * off).sum())
    assert losses[0] == pytest.approx(losses[1], rel=4e-3)
    assert packed.isclose(expected, rtol=1e-4).float().mean() > 0.8


@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_a_weight_is_packed_by_one_means_whenever_a_kernel_comes(name, monkeypatch):
    """What a kernel chooses is not bit for bit what torch chooses."""
    asked, real = [], kernels.find

    def find(op, *case, **more):
        if op == "pack_columns":
            asked.append(op)
        return None if asked[1:] else real(op, *case, **more)

    weight, moments = weight_of(37, 512), moments_of(inputs(900, 512), 256)
    monkeypatch.setattr(damped_hessian, "CPU_ROWS", 10)
    whole = pack_with_feedback(weight, FORMATS[name], moments)
    monkeypatch.setattr(kernels, "find", find)
    assert torch.equal(pack_with_feedback(weight, FORMATS[name], moments)._qdata, whole._qdata)
    assert len(asked) == 1


@each_format
def test_the_bytes_are_those_of_the_format(fmt):
    """What was chosen is what readers of the format see: no field of the layout is out of its
    range."""
    weight, tokens = weight_of(8, 512), inputs(600, 512)
    packed = pack_with_feedback(weight, fmt, moments_of(tokens))
    if fmt.ggml_type is None:
        pytest.skip("bitsandbytes' own dequantising is compared in test_bitsandbytes.py")
    expected = gguf.quants.dequantize(
        packed._qdata.view(8, -1).numpy(), GGMLQuantizationType(fmt.ggml_type))
    assert torch.equal(packed.dequantize(), torch.from_numpy(np.ascontiguousarray(expected)))
    assert output_error(weight, packed, tokens) < 0.2


@each_format
def test_inputs_that_are_alike_in_all_columns_do_no_harm(fmt):
    """Without correlations there is nothing to feed back."""
    weight = weight_of(32, 512)
    moments = SecondMoments.zeros(512)
    moments.blocks += torch.eye(512)
    moments.count = 512
    packed = pack_with_feedback(weight, fmt, moments)
    plain = pack_tensor(weight, fmt, importance=torch.ones(512))
    off, plainly = ((part.dequantize() - weight).square().mean() for part in (packed, plain))
    assert off < 1.08 * plainly


HARD = {
    "no tokens": torch.zeros(0, 512), "zeros": torch.zeros(100, 512), "one token": inputs(1, 512),
    "three tokens": inputs(3, 512),
    "a constant column": torch.cat([torch.full(
        (900, 1), 30.0), inputs(900, 511)], 1), "a column that is never used": torch.cat(
            [inputs(900, 511), torch.zeros(900, 1)],
            1), "two equal columns": inputs(900, 512)[:, [0, *range(511)]],
    "one column alone": torch.eye(512)[:1].repeat(50, 1), "huge": inputs(900, 512) * 1e15,
    "tiny": inputs(900, 512) * 1e-15,
    "one column of 1e6": inputs(900, 512) * torch.tensor([1e6] + [1.0] * 511)
}


@pytest.mark.parametrize("tokens", HARD.values(), ids=HARD)
@pytest.mark.parametrize(("name", "block"), [
    ("Q4_K", 256), pytest.param("Q3_K", None, marks=pytest.mark.heavy),
    pytest.param("NF4", None, marks=pytest.mark.heavy)])
def test_any_moments_give_a_weight_near_the_one_given(name, tokens, block):
    fmt, weight, moments = FORMATS[name], weight_of(16, 512), SecondMoments.zeros(512, block)
    moments.add(tokens, hold_out=False)
    values = pack_with_feedback(weight, fmt, moments).dequantize()
    assert values.isfinite().all()
    plain = pack_tensor(weight, fmt).dequantize()
    assert (values - weight).square().sum() < 4 * (plain - weight).square().sum()


def test_moments_that_no_inputs_could_have_are_damped_until_they_can_be_factored():
    """As rounding in a file may leave them."""
    weight, moments = weight_of(16, 256), moments_of(inputs(900, 256))
    scale = moments.blocks.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    moments.blocks[0, 0, 1] = moments.blocks[0, 1, 0] = 1.3 * scale[0] * scale[1]
    off = (pack_with_feedback(weight, Q4_K, moments).dequantize() - weight).square().sum()
    assert off < 8 * (pack_tensor(weight, Q4_K).dequantize() - weight).square().sum()


def test_in_q3_k_tokens_count_beside_many_that_are_alike(monkeypatch):
    """As the words of a prompt do beside its padding."""
    weight, words, moments = weight_of(32, 256), inputs(4000, 256), SecondMoments.zeros(256)
    moments.add(words, hold_out=False)
    moments.add(3 * words[:1].expand(36000, 256), hold_out=False)
    packed = pack_with_feedback(weight, FORMATS["Q3_K"], moments)
    monkeypatch.setattr(damped_hessian, "DAMPING_BY_FORMAT", {})
    more_damped = pack_with_feedback(weight, FORMATS["Q3_K"], moments)
    assert output_error(weight, packed, words) < 0.8 * output_error(weight, more_damped, words)


@some_formats
def test_the_guard_keeps_what_has_less_error_for_tokens_held_out(fmt):
    weight, seen, others = (
        weight_of(32, 512),
        inputs(40, 512),
        inputs(2000, 512, seed=7, power=0).flip(1),
    )
    for held_out in (seen, others):
        moments = SecondMoments.zeros(512)
        moments.add(seen, hold_out=False)
        moments.add(held_out, hold_out=True)
        candidates = [
            pack_with_feedback(weight, fmt, moments),
            pack_tensor(weight, fmt, importance=moments.importance)
        ]
        true = [output_error(weight, candidate, held_out) for candidate in candidates]
        told = output_errors(weight, candidates, moments)
        assert told == pytest.approx(true, rel=0.3)
        assert pick_lower_error(weight, candidates, moments) is candidates[true.index(min(true))]


def test_without_tokens_held_out_the_guard_judges_by_those_seen():
    weight, tokens = weight_of(32, 700 // 256 * 256), inputs(900, 512)
    for block in (None, 256):
        moments = SecondMoments.zeros(512, block)
        moments.add(tokens)
        assert not moments.held_out_count
        candidates = [pack_tensor(weight, Q4_K), pack_with_feedback(weight, Q4_K, moments)]
        assert pick_lower_error(weight, candidates, moments) is candidates[1]


@each_format
def test_packing_by_moments_is_never_worse_than_by_importance(fmt):
    weight = weight_of(32, 512)
    for tokens in (inputs(2000, 512), inputs(60, 512, power=0)):
        moments = moments_of(tokens)
        guarded, plain = (
            pack_tensor(weight, fmt, moments=moments),
            pack_tensor(weight, fmt, importance=moments.importance),
        )
        errors = output_errors(weight, [guarded, plain], moments)
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "NF4", "Q8_0"])
def test_slices_of_rows_are_as_the_whole(name, monkeypatch):
    weight, moments = weight_of(37, 512), moments_of(inputs(900, 512))
    whole = pack_with_feedback(weight, FORMATS[name], moments)
    monkeypatch.setattr(damped_hessian, "CPU_ROWS", 10)
    assert_alike(weight, whole, pack_with_feedback(weight, FORMATS[name], moments),
                 inputs(900, 512))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_dtype_and_of_more_dimensions(dtype):
    weight, moments = weight_of(16, 512).to(dtype), moments_of(inputs(900, 512))
    packed, expected = (pack_with_feedback(part, Q4_K, moments)
                        for part in (weight.view(16, 2, 256), weight.float()))
    assert packed.shape == (16, 2, 256) and packed.dtype == torch.float32
    assert torch.equal(packed._qdata, expected._qdata)


@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_temporaries_are_those_of_a_slice_whatever_the_weight(name, monkeypatch):
    monkeypatch.setattr(damped_hessian, "SLICE_BYTES", 5 * 4 * 256 * 32)
    moments = moments_of(inputs(300, 512), 256)
    weight = weight_of(70, 512)
    with Largest(lambda part: part.numel() if part.is_floating_point() else 0) as largest:
        packed = pack_with_feedback(weight, FORMATS[name], moments)
        pick_lower_error(weight, [packed, packed], moments)
    assert largest.most == 256 * 256, "the moments of one block are more than a slice of 32 rows"


def test_numbers_that_are_not_finite_are_refused():
    weight, moments = weight_of(4, 512), moments_of(inputs(300, 512))
    for wrong in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[1, 3] = wrong
        with pytest.raises(FormatError, match="weight holds NaN or infinite values"):
            pack_with_feedback(broken, Q4_K, moments)
        broken = moments_of(inputs(300, 512))
        broken.blocks[0, 3, 4] = wrong
        with pytest.raises(FormatError,
                           match="moments of the layer's inputs hold NaN or infinite values"):
            pack_with_feedback(weight, Q4_K, broken)


@pytest.mark.parametrize(
    ("weight", "fmt", "columns", "message"),
    [
        (torch.ones(4, 384), "Q4_K", 384, "rows of 384 values: they are not whole blocks of 256"),
        (
            torch.ones(4, 512),
            "Q4_K",
            768,
            r"inputs with 768 columns, the weight of shape \(4, 512\) takes 512",
        ),
        (torch.ones(4, 512), "BF16", 512, "BF16 cannot be packed with error feedback"),
    ],
)
def test_what_does_not_go_together_is_refused(weight, fmt, columns, message):
    with pytest.raises(FormatError, match=message):
        pack_with_feedback(weight, FORMATS[fmt], SecondMoments.zeros(columns))
