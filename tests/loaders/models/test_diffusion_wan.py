"""Wan in diffusers' names against diffusers' own class."""
import pytest
from diffusers_names import wan_names, wan_shapes
from diffusion_tester import WAN_SHAPES
from families import FAMILIES, random_weights


@pytest.mark.parametrize("family_name", WAN_SHAPES)
def test_names_and_shapes_are_those_of_the_host(family_name):
    shapes = wan_shapes(**WAN_SHAPES[family_name])
    weights, names = random_weights(FAMILIES[family_name]), wan_names(shapes)
    assert {host_name: shapes[name] for host_name, name in names.items()} == {
        host_name: tensor.shape for host_name, tensor in weights.items()}
