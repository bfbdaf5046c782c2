"""Diffusion models in diffusers' names of each quantiser of the Hugging Face libraries, beside the
host's dense model of the same values."""
from pathlib import Path

import pytest
import torch
from patched_models import LIMIT, dense_of, error_by_effect, lora_for, patched, relative, run
from quantizer_models import QUANTIZED_MODELS, write_quantized_flux
from safetensors.torch import load, save_file

from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def model(request, tmp_path):
    """A folder with a Flux whose blocks are quantised, and its dense values in the host's names."""
    return str(tmp_path), write_quantized_flux(tmp_path, request.param)


@pytest.mark.parametrize("model", QUANTIZED_MODELS, indirect=True)
def test_a_model_draws_what_its_dense_values_draw(model):
    path, values = model
    assert needs_own_reader(path)
    ours = load_diffusion_model(path)
    assert sum(map(is_packed, ours.model.diffusion_model.parameters())) >= 13
    assert relative(run(ours), run(dense_of(values))) < 1e-5


@pytest.mark.parametrize("model", QUANTIZED_MODELS, indirect=True)
def test_a_model_takes_no_more_memory_than_its_file(model):
    file = open_weights(model[0])
    tensors = file.state_dict()
    packed = {name: tensor for name, tensor in tensors.items() if is_packed(tensor)}
    plain = sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
    plain += sum(entry.nbytes for name, entry in file.entries.items() if name.endswith(".g_idx"))
    size = sum(tensor.nbytes for tensor in packed.values())
    # a low rank's factors of rows and columns count in layers as small as these
    assert size <= 1.06 * (file.tensor_bytes - plain)


@pytest.mark.parametrize("model", [
    "gptq", "gptq act-order", "gptqmodel 7 bits", "compressed-tensors", "compressed-tensors 5 bits",
    "compressed-tensors mxfp4", "compressed-tensors mxfp6", "compressed-tensors blocks", "fp8",
    "auto-round mxfp8", "modelopt svdquant"], indirect=True)
def test_two_loras_are_exact(model):
    path, values = model
    ours, dense = load_diffusion_model(path), dense_of(values)
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(values, "dora", seed=2), 0.5)]
    expected = run(patched(dense, *loras))
    assert error_by_effect(run(patched(ours, *loras)), expected, run(dense)) < LIMIT


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
