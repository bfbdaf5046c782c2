"""Diffusion models in diffusers' names of each quantiser of the Hugging Face libraries, beside the
host's dense model of the same values."""
from pathlib import Path

import pytest
import torch
from pack_api import WeightFileError, load_diffusion_model
from quantizer_models import write_quantized_flux
from safetensors.torch import load, save_file

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def model(request, tmp_path):
    """A folder with a Flux whose blocks are quantised, and its dense values in the host's names."""
    return str(tmp_path), write_quantized_flux(tmp_path, request.param)


def change_bias(folder, change):
    """Changes a bias that is joined with others, and returns its name."""
    path = next(Path(folder).glob("*.safetensors"))
    tensors = load(path.read_bytes())
    name = "single_transformer_blocks.0.attn.to_k.bias"
    tensors[name] = change(tensors[name])
    save_file(tensors, path)
    return name


@pytest.mark.parametrize("model", ["gptq", "compressed-tensors int8"], indirect=True)
def test_a_bias_of_another_length_than_its_weight_is_a_sentence_about_it(model):
    path, _ = model
    name = change_bias(path, lambda bias: bias[:-1].clone())
    with pytest.raises(WeightFileError, match=f" is damaged: '{name}' has the shape") as error:
        load_diffusion_model(path)
    assert "Update ComfyUI" not in str(error.value)


@pytest.mark.parametrize("model", ["gptq", "compressed-tensors int8"], indirect=True)
def test_a_bias_in_fp8_is_joined_with_others(model):
    path, _ = model
    change_bias(path, lambda bias: torch.full_like(bias, 0.5).to(torch.float8_e4m3fn))
    bias = load_diffusion_model(path).model.diffusion_model.single_blocks[0].linear1.bias
    width = len(bias) // 7
    assert torch.equal(bias[width:2 * width].float(), torch.full((width,), 0.5))
