"""Wan in diffusers' names, as AutoRound writes it, against diffusers' own class."""
import functools
import json

import pytest
from diffusers_names import wan_names, wan_shapes
from families import FAMILIES, host_patcher, random_weights, relative_error, run
from quantizer_writers import gptq, quantized_state_dict
from safetensors.torch import save_file

from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.tensor.packed_layout import is_packed

pytest.importorskip("diffusers", reason="it has the names")

OF_IMAGES = {"image_dim": 1280, "added_kv_proj_dim": 256}


@pytest.mark.parametrize(("family_name", "kwargs"), [
    ("wan2.1-t2v", {"columns": 16}), ("wan2.1-i2v", OF_IMAGES)])
def test_names_and_shapes_are_those_of_the_host(family_name, kwargs):
    shapes, weights = wan_shapes(**kwargs), random_weights(FAMILIES[family_name])
    names = wan_names(shapes)
    assert {host_name: shapes[name] for host_name, name in names.items()} == {
        host_name: tensor.shape for host_name, tensor in weights.items()}


@pytest.mark.parametrize(("family_name", "kwargs"), [
    ("wan2.1-t2v", {"columns": 16}), ("wan2.1-i2v", OF_IMAGES)])
def test_a_model_of_auto_round_draws_what_its_dense_values_draw(family_name, kwargs, tmp_path):
    family = FAMILIES[family_name]
    names = wan_names(wan_shapes(**kwargs))
    weights = {names[name]: tensor for name, tensor in random_weights(family).items()}
    stored, values = quantized_state_dict(
        weights, functools.partial(gptq, symmetric=True), lambda name: ".attn" not in name)
    save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "_class_name": "WanTransformer3DModel",
        "quantization_config": {"quant_method": "auto-round"}}))
    ours = load_diffusion_model(str(tmp_path))
    assert sum(map(is_packed, ours.model.diffusion_model.parameters())) >= 8
    expected = host_patcher({name: values[names[name]] for name in names}, family)
    assert relative_error(run(ours, family), run(expected, family)) < 1e-5
