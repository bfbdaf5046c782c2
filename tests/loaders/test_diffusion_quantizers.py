"""Diffusion models in diffusers' names of each quantiser of the Hugging Face libraries, beside the
host's dense model of the same values."""
import functools
import json

import comfy.sd
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from patched_models import LIMIT, error_by_effect, lora_for, patched, relative, run, tiny_flux
from quantizer_writers import (
    awq,
    gptq,
    int_quantized,
    nvfp4,
    pack_quantized,
    quantized_state_dict,
    quanto_bits,
    quanto_bytes,
    torchao_bytes,
    torchao_header,
    torchao_integers,
)
from safetensors.torch import save_file

from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.loaders.files import open_weights
from featherweight.loaders.inspect.contents import file_contents
from featherweight.loaders.inspect.inspection import identify
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.reader_choice import needs_own_reader
from featherweight.ops.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")

CONFIG = {"depth": 1, "depth_single_blocks": 1, "hidden_size": 256}


def out_of_order(values):
    return gptq(values, order=torch.randperm(values.shape[1],
                                             generator=torch.Generator().manual_seed(3)))


# family -> (writer of a weight, quantization_config, header of a weight or None)
FAMILIES = {
    "gptq": (gptq, {"quant_method": "gptq"}, None),
    "gptq act-order": (out_of_order, {"quant_method": "gptq", "desc_act": True}, None),
    "auto-round": (functools.partial(gptq, symmetric=True), {"quant_method": "auto-round"}, None),
    "auto-round 2 bits": (functools.partial(gptq, bits=2, stored_less=0), {
        "quant_method": "auto-round", "packing_format": "auto_round"}, None),
    "auto-round 3 bits": (functools.partial(gptq, bits=3), {"quant_method": "auto-round"}, None),
    "awq": (awq, {"quant_method": "awq"}, None),
    "compressed-tensors": (functools.partial(pack_quantized, symmetric=False),
                           {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors int8": (int_quantized, {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors nvfp4": (nvfp4, {"quant_method": "compressed-tensors"}, None),
    "quanto": (quanto_bits, {"quant_method": "quanto"}, None),
    "quanto int8": (quanto_bytes, {"quant_method": "quanto"}, None),
    "torchao int8": (torchao_bytes, {"quant_method": "torchao"}, torchao_header("Int8Tensor")),
    "torchao int4": (torchao_integers, {"quant_method": "torchao"},
                     torchao_header("IntxUnpackedToInt8Tensor", target_dtype="int4")),
}


def keeps(name):
    return "transformer_blocks." not in name


@pytest.fixture
def model(request, tmp_path):
    """A folder with a Flux whose blocks are quantised, and its dense values in the host's names."""
    write, config, header = FAMILIES[request.param]
    # the table's spelling
    weights = {name.replace("_norm.scale", "_norm.weight"): value
               for name, value in tiny_flux().items()}
    table = DIFFUSERS["flux-dev"](CONFIG)
    stored, values = quantized_state_dict(in_diffusers_names(weights, table), write, keeps)
    metadata = {name: header for name, tensor in values.items()
                if tensor.ndim == 2 and not keeps(name)} if header else None
    save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors", metadata)
    (tmp_path / "config.json").write_text(json.dumps({
        "_class_name": "FluxTransformer2DModel", "quantization_config": config}))
    return str(tmp_path), in_the_hosts_names(values, weights, table)


def dense_model(values):
    return comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in values.items()})


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_model_draws_what_its_dense_values_draw(model):
    path, values = model
    assert needs_own_reader(path)
    ours = load_diffusion_model(path)
    assert sum(map(is_packed, ours.model.diffusion_model.parameters())) >= 13
    assert relative(run(ours), run(dense_model(values))) < 1e-5


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_model_takes_no_more_memory_than_its_file(model):
    file = open_weights(model[0])
    tensors = file.state_dict()
    packed = {name: tensor for name, tensor in tensors.items() if is_packed(tensor)}
    plain = sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
    plain += sum(entry.nbytes for name, entry in file.entries.items() if name.endswith(".g_idx"))
    size = sum(tensor.nbytes for tensor in packed.values())
    assert size <= 1.05 * (file.tensor_bytes - plain)


@pytest.mark.parametrize("model", ["gptq", "gptq act-order", "compressed-tensors"], indirect=True)
def test_two_loras_are_exact(model):
    path, values = model
    ours, dense = load_diffusion_model(path), dense_model(values)
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(values, "dora", seed=2), 0.5)]
    expected = run(patched(dense, *loras))
    assert error_by_effect(run(patched(ours, *loras)), expected, run(dense)) < LIMIT


@pytest.mark.parametrize(("model", "title", "quantizer"), [
    ("gptq", "int4 in groups", "GPTQ"), ("auto-round 3 bits", "int3 in groups", "AutoRound"),
    ("awq", "int4 in groups", "AWQ"), ("quanto", "quanto int4", "quanto"),
    ("compressed-tensors nvfp4", "nvfp4", "compressed-tensors")], indirect=["model"])
def test_an_inspection_names_the_format_and_the_quantiser(model, title, quantizer):
    inspection = identify(file_contents(model[0]))
    assert title in inspection.types and inspection.family == "Flux.1"
    assert f"packed by: {quantizer}" in inspection_text(inspection).splitlines()


def test_an_inspection_of_a_single_file_names_the_quantiser(tmp_path):
    parts, _ = gptq(torch.randn(64, 64), symmetric=True)
    save_file({f"L.{name}": value for name, value in parts.items()}, tmp_path / "a.safetensors")
    assert identify(file_contents(tmp_path / "a.safetensors")).quantizer == (
        "GPTQ, AutoRound or AWQ")
