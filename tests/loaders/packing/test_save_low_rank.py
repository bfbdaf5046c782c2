"""A model whose weights have a low rank of their own is saved with it."""
import gguf
import nunchaku_writer
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import FAMILIES, random_weights, relative_error
from pack_api import KEEP_TYPES, is_packed, load_diffusion_model, open_weights, source_of_model
from saving import save
from sdnq_writer import write_folder

pytestmark = pytest.mark.usefixtures("small_models")
FAMILY = FAMILIES["flux-dev"]
TABLE = DIFFUSERS["flux-dev"](FAMILY.config)


def write_nunchaku(path, weights):
    model = nunchaku_writer.flux(weights, precision="int4")
    nunchaku_writer.write(path, model)
    return model.values


def write_sdnq(path, weights):
    return write_folder(path, weights, name="uint4", rank=16, group=64,
                        is_chosen=lambda name, tensor: tensor.ndim == 2 and all(
                            size % 64 == 0 for size in tensor.shape))


@pytest.fixture(params=[write_nunchaku, write_sdnq], ids=["svdquant", "sdnq"])
def model(request, tmp_path):
    """(model, its values in the host's names)"""
    path, weights = tmp_path / "flux.safetensors", random_weights(FAMILY)
    values = request.param(path, in_diffusers_names(weights, TABLE))
    return load_diffusion_model(str(path)), in_the_hosts_names(values, weights, TABLE)


def test_a_saved_weight_is_the_sum_in_the_type_asked_for(model, tmp_path):
    patcher, values = model
    save(source_of_model(patcher), tmp_path / "a.gguf", "Q8_0")
    saved = {name: tensor for name, tensor in open_weights(tmp_path / "a.gguf").state_dict().items()
             if is_packed(tensor) and tensor.params.format.name == "Q8_0"}
    assert len(saved) > 10
    for name, tensor in saved.items():
        packed = gguf.quants.quantize(values[name].numpy(), gguf.GGMLQuantizationType.Q8_0)
        reference = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        error, least = (relative_error(dense, values[name])
                        for dense in (tensor.dequantize(), torch.from_numpy(reference)))
        assert error <= 1.01 * least < 0.01, name


def test_weights_that_are_saved_as_they_are_become_16_bits(model, tmp_path):
    patcher, values = model
    save(source_of_model(patcher), tmp_path / "a.gguf", KEEP_TYPES)
    for name, tensor in open_weights(tmp_path / "a.gguf").state_dict().items():
        if tensor.ndim < 2:
            continue
        dense = tensor.dequantize() if is_packed(tensor) else tensor.float()
        assert relative_error(dense, values[name]) < 3e-3, name
