"""What packing makes of a trained model's matrices, where nothing was measured: the error of their
outputs."""
import packing_error
import pytest


@pytest.fixture(scope="module")
def demo():
    weights = packing_error.demo_weights()
    return weights, packing_error.second_moments()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("type_name", packing_error.LEAST)
def test_outputs_are_as_near_as_they_were_found_to_be(demo, type_name):
    weights, moments = demo
    assert len(moments) == 26
    assert packing_error.mean_snr(type_name, weights, moments) >= packing_error.LEAST[type_name]
