"""Packing with error feedback: what it gains, and that it is safe with any moments."""
import pytest
import torch
from kernel_cases import Largest
from pack_api import FORMATS, FormatError, SecondMoments, pack_tensor
from packing_cases import (
    FEEDBACK_SAMPLE,
    GRIDS,
    each_of,
    inputs,
    moments_of,
    normal,
    output_error,
)

from featherweight.ops import kernels
from featherweight.ops.packing.error_feedback import pack_with_feedback
from featherweight.ops.packing.method_choice import output_errors, pick_lower_error
from featherweight.ops.quantize import column_order, damped_hessian

Q4_K = FORMATS["Q4_K"]
SAMPLE = [name for name in FEEDBACK_SAMPLE if name in GRIDS]
some_formats = pytest.mark.parametrize("name", SAMPLE)
each_format = each_of(GRIDS, SAMPLE)
pytestmark = pytest.mark.usefixtures("small_models", "by")


def error(weight: torch.Tensor, packed: torch.Tensor) -> float:
    return float((packed.dequantize() - weight).square().sum())


@pytest.mark.parametrize("period", [32, 256], ids=["groups", "blocks"])
@pytest.mark.parametrize("sweeps", [0, 1])
def test_errors_are_taken_up_by_columns_of_later_groups_and_blocks(period, sweeps, monkeypatch):
    """Inputs that repeat: nearly all of an error can be taken up by the columns that go along with
    its own."""
    monkeypatch.setattr(column_order, "SWEEPS", sweeps)
    weight, tokens = normal(32, 512), inputs(900, period).repeat(1, 512 // period)
    moments = moments_of(tokens)
    plain, packed = (output_error(weight, packed, tokens) for packed in (
        pack_tensor(weight, Q4_K, importance=moments.importance),
        pack_with_feedback(weight, Q4_K, moments)))
    assert packed < 0.1 * plain


@pytest.mark.parametrize("by", ["kernel"], indirect=True)
@each_format
def test_what_the_kernel_chooses_is_what_torch_chooses_but_for_ties(name, monkeypatch):
    fmt, weight, tokens = FORMATS[name], normal(1000, 512), inputs(2000, 512)
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

    weight, moments = normal(37, 512), moments_of(inputs(900, 512), 256)
    monkeypatch.setattr(damped_hessian, "CPU_ROWS", 10)
    whole = pack_with_feedback(weight, FORMATS[name], moments)
    monkeypatch.setattr(kernels, "find", find)
    assert torch.equal(pack_with_feedback(weight, FORMATS[name], moments)._qdata, whole._qdata)
    assert len(asked) == 1


@each_format
def test_inputs_that_are_alike_in_all_columns_do_no_harm(name):
    """Without correlations there is nothing to feed back."""
    weight, moments = normal(32, 512), SecondMoments.zeros(512)
    moments.blocks += torch.eye(512)
    moments.count = 512
    plain = pack_tensor(weight, FORMATS[name], importance=torch.ones(512))
    packed = pack_with_feedback(weight, FORMATS[name], moments)
    assert error(weight, packed) < 1.08 * error(weight, plain)


HARD = {
    "no tokens": torch.zeros(0, 512), "zeros": torch.zeros(100, 512), "one token": inputs(1, 512),
    "three tokens": inputs(3, 512),
    "a constant column": torch.cat([torch.full((900, 1), 30.0), inputs(900, 511)], 1),
    "a column that is never used": torch.cat([inputs(900, 511), torch.zeros(900, 1)], 1),
    "two equal columns": inputs(900, 512)[:, [0, *range(511)]],
    "one column alone": torch.eye(512)[:1].repeat(50, 1), "huge": inputs(900, 512) * 1e15,
    "tiny": inputs(900, 512) * 1e-15,
    "one column of 1e6": inputs(900, 512) * torch.tensor([1e6] + [1.0] * 511)
}


@pytest.mark.parametrize("tokens", HARD.values(), ids=HARD)
@pytest.mark.parametrize(("name", "block"), [
    ("Q4_K", 256), pytest.param("Q3_K", None, marks=pytest.mark.heavy),
    pytest.param("NF4", None, marks=pytest.mark.heavy)])
def test_any_moments_give_a_weight_near_the_one_given(name, tokens, block):
    weight, moments = normal(16, 512), SecondMoments.zeros(512, block)
    moments.add(tokens, hold_out=False)
    packed = pack_with_feedback(weight, FORMATS[name], moments)
    assert error(weight, packed) < 4 * error(weight, pack_tensor(weight, FORMATS[name]))


def test_moments_that_no_inputs_could_have_are_damped_until_they_can_be_factored():
    """As rounding in a file may leave them."""
    weight, moments = normal(16, 256), moments_of(inputs(900, 256))
    scale = moments.blocks.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    moments.blocks[0, 0, 1] = moments.blocks[0, 1, 0] = 1.3 * scale[0] * scale[1]
    packed = pack_with_feedback(weight, Q4_K, moments)
    assert error(weight, packed) < 8 * error(weight, pack_tensor(weight, Q4_K))


def test_in_q3_k_tokens_count_beside_many_that_are_alike(monkeypatch):
    """As the words of a prompt do beside its padding."""
    weight, words, moments = normal(32, 256), inputs(4000, 256), SecondMoments.zeros(256)
    moments.add(words, hold_out=False)
    moments.add(3 * words[:1].expand(36000, 256), hold_out=False)
    packed = pack_with_feedback(weight, FORMATS["Q3_K"], moments)
    monkeypatch.setattr(damped_hessian, "DAMPING_BY_FORMAT", {})
    more_damped = pack_with_feedback(weight, FORMATS["Q3_K"], moments)
    assert output_error(weight, packed, words) < 0.8 * output_error(weight, more_damped, words)


@some_formats
def test_the_guard_keeps_what_has_less_error_for_tokens_held_out(name):
    weight, seen = normal(32, 512), inputs(40, 512)
    for held_out in (seen, inputs(2000, 512, seed=7, power=0).flip(1)):
        moments = SecondMoments.zeros(512)
        moments.add(seen, hold_out=False)
        moments.add(held_out, hold_out=True)
        candidates = [pack_with_feedback(weight, FORMATS[name], moments),
                      pack_tensor(weight, FORMATS[name], importance=moments.importance)]
        true = [output_error(weight, candidate, held_out) for candidate in candidates]
        assert output_errors(weight, candidates, moments) == pytest.approx(true, rel=0.3)
        assert pick_lower_error(weight, candidates, moments) is candidates[true.index(min(true))]


@pytest.mark.parametrize("block", [None, 256])
def test_without_tokens_held_out_the_guard_judges_by_those_seen(block):
    weight, moments = normal(32, 512), SecondMoments.zeros(512, block)
    moments.add(inputs(900, 512))
    assert not moments.held_out_count
    candidates = [pack_tensor(weight, Q4_K), pack_with_feedback(weight, Q4_K, moments)]
    assert pick_lower_error(weight, candidates, moments) is candidates[1]


@some_formats
def test_slices_of_rows_are_as_the_whole(name, monkeypatch):
    """But for codes that sums in another order round to the other side, and what follows."""
    weight, tokens = normal(37, 512), inputs(900, 512)
    moments = moments_of(tokens)
    whole = pack_with_feedback(weight, FORMATS[name], moments)
    monkeypatch.setattr(damped_hessian, "CPU_ROWS", 10)
    sliced = pack_with_feedback(weight, FORMATS[name], moments)
    values, others = whole.dequantize(), sliced.dequantize()
    assert values.isclose(others, rtol=1e-4).float().mean() > 0.3
    assert output_error(weight, whole, tokens) == pytest.approx(
        output_error(weight, sliced, tokens), rel=0.1)
    assert ((values - others).square().sum(1) < 3 * (values - weight).square().sum(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_dtype_and_of_more_dimensions(dtype):
    weight, moments = normal(16, 512).to(dtype), moments_of(inputs(900, 512))
    packed, expected = (pack_with_feedback(part, Q4_K, moments)
                        for part in (weight.view(16, 2, 256), weight.float()))
    assert packed.shape == (16, 2, 256) and packed.dtype == torch.float32
    assert torch.equal(packed._qdata, expected._qdata)


@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_temporaries_are_those_of_a_slice_whatever_the_weight(name, monkeypatch):
    monkeypatch.setattr(damped_hessian, "SLICE_BYTES", 5 * 4 * 256 * 32)
    weight, moments = normal(70, 512), moments_of(inputs(300, 512), 256)
    with Largest(lambda part: part.numel() if part.is_floating_point() else 0) as largest:
        packed = pack_with_feedback(weight, FORMATS[name], moments)
        pick_lower_error(weight, [packed, packed], moments)
    assert largest.most == 256 * 256, "the moments of one block are more than a slice of 32 rows"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(wrong):
    weight, moments = normal(4, 512), moments_of(inputs(300, 512))
    moments.blocks[0, 3, 4] = wrong
    with pytest.raises(FormatError, match="moments of the layer's inputs hold NaN or infinite"):
        pack_with_feedback(weight, Q4_K, moments)
    weight[1, 3] = wrong
    with pytest.raises(FormatError, match="weight holds NaN or infinite values"):
        pack_with_feedback(weight, Q4_K, moments_of(inputs(300, 512)))


@pytest.mark.parametrize(("name", "columns", "inputs_of", "message"), [
    ("Q4_K", 384, 384, "rows of 384 values: they are not whole blocks of 256"),
    ("Q4_K", 512, 768, r"inputs with 768 columns, the weight of shape \(4, 512\) takes 512"),
    ("BF16", 512, 512, "BF16 cannot be packed with error feedback")])
def test_what_does_not_go_together_is_refused(name, columns, inputs_of, message):
    with pytest.raises(FormatError, match=message):
        pack_with_feedback(torch.ones(4, columns), FORMATS[name], SecondMoments.zeros(inputs_of))
