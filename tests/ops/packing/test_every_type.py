"""What holds for every type that weights are packed to, by torch and by the kernels of a CPU."""
import pytest
import torch
from pack_api import FormatError, packed_tensors
from packing_cases import (
    EACH,
    GRIDS,
    USUAL,
    each_type,
    each_with_feedback,
    in_small_slices,
    inputs,
    moments_of,
    normal,
    output_error,
    weight_of,
)

from featherweight.ops.packing.method_choice import output_errors

pytestmark = pytest.mark.usefixtures("one_thread", "by")


@each_type
def test_zeros_stay_zeros(name):
    weight = weight_of()
    weight[3] = 0
    weight[:, :256] = 0
    values = EACH[name].pack(weight).dequantize()
    assert not values[3].any() and not values[:, :256].any()
    assert not EACH[name].pack(torch.zeros(96, 512)).dequantize().any()


@pytest.mark.parametrize("inference", [False, True])
@each_type
def test_a_slice_on_any_thread_is_packed_as_in_the_whole(name, inference, monkeypatch):
    weight = weight_of()
    whole = packed_tensors(EACH[name].pack(weight))
    in_small_slices(monkeypatch)
    with torch.inference_mode(inference):
        sliced = packed_tensors(EACH[name].pack(weight))
    assert torch.get_num_threads() == 2
    assert all(tensor.is_inference() == inference for tensor in sliced)
    assert all(map(torch.equal, sliced, whole))
    if name in GRIDS:  # the rows of others may share a number
        for part, of_whole in zip(packed_tensors(EACH[name].pack(weight[3:5])), whole):
            assert torch.equal(part.view(2, -1), of_whole.view(96, -1)[3:5])


@each_type
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_on_any_thread(name, bad, monkeypatch):
    weight = weight_of()
    weight[-1, -1] = bad
    in_small_slices(monkeypatch)
    with pytest.raises(FormatError, match="NaN or infinite"):
        EACH[name].pack(weight)
    assert torch.get_num_threads() == 2


@each_type
@pytest.mark.parametrize("shape", [(3, 4, 5), (8, 100)], ids=str)
def test_a_shape_is_packed_or_refused_as_the_type_says(name, shape):
    if EACH[name].takes(shape):
        assert EACH[name].pack(torch.zeros(shape)).shape == shape
    else:
        with pytest.raises(FormatError, match="does not divide|does not hold a weight of shape"):
            EACH[name].pack(torch.zeros(shape))


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=() if name in USUAL else pytest.mark.heavy)
    for name in EACH for dtype in (torch.float64, torch.float16, torch.bfloat16,
                                   *[torch.float8_e4m3fn] * (name in GRIDS))], ids=str)
def test_weights_of_any_float_dtype_and_order_are_packed_as_in_float32(name, dtype):
    weight = normal(32, 512).to(dtype)
    expected = packed_tensors(EACH[name].pack(weight.float()))
    for same in (weight, weight.t().contiguous().t()):
        assert all(map(torch.equal, packed_tensors(EACH[name].pack(same)), expected))


@pytest.mark.parametrize("block", [None, 256], ids=["all columns", "blocks of 256"])
@each_with_feedback
def test_feedback_gives_a_smaller_error_of_the_output(name, block):
    weight, tokens = weight_of(64), inputs(2600, 512)
    moments = moments_of(tokens[:2000], block)
    plain = EACH[name].pack(weight, importance=moments.importance)
    packed = EACH[name].pack(weight, moments)
    assert (packed.shape, packed.dtype, packed.nbytes) == (
        weight.shape, torch.float32, plain.nbytes)
    gain = output_error(weight, plain, tokens[2000:]) / output_error(weight, packed, tokens[2000:])
    assert gain > (1 if name not in GRIDS else 1.4 if block else 2), gain


@each_with_feedback
def test_packing_by_moments_is_never_worse_than_without(name):
    weight = normal(32, 512)
    for tokens in (inputs(2000, 512), inputs(60, 512, power=0)):
        moments = moments_of(tokens)
        guarded = EACH[name].pack(weight, moments)
        plain = EACH[name].pack(weight, importance=moments.importance)
        errors = output_errors(weight, [guarded, plain], moments)
        assert errors[0] <= errors[1]
