"""Diffusion models that Nunchaku quantised run as the host runs their values, and stay packed."""
import json
import logging

import nunchaku_writer as writer
import pytest
import torch
from diffusers_names import in_diffusers_names
from families import FAMILIES, relative_error
from families import run as run_family
from hooked import run_hooked
from lora_gain import Gain
from nunchaku_models import dense_of, load, quantized, table_of, weights_of
from patched_models import LIMIT, adapter, error_by_effect, lora_for, patched
from safetensors.torch import save_file

from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.comfyui.model_summary import memory_summary
from featherweight.loaders.inspect.inspection import identify
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.layers import product
from featherweight.ops.low_rank import LowRank
from featherweight.ops.tensor.packed_layout import is_packed, relabel

pytestmark = pytest.mark.usefixtures("small_models")

FLUX = "flux-dev"
MODELS = [(name, precision) for name in writer.WRITERS for precision in ("int4", "nvfp4")]
# bytes in memory for one in the file; a rank of 16 for 256 columns is one of 192 for 3072
MOST_HELD = 1.05


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


@pytest.fixture(params=MODELS, ids="-".join)
def model(request, tmp_path):
    """(family, packed model, the host's model of its values, these, bytes of the file)"""
    name, precision = request.param
    stored, path = quantized(name, precision), tmp_path / "model.safetensors"
    writer.write(path, stored)
    dense, weights = dense_of(name, stored.values)
    size = sum(tensor.nbytes for tensor in stored.tensors.values())
    return name, load(name, path), dense, weights, size


def assert_same(name, path, values):
    dense, _ = dense_of(name, values)
    patcher = load(name, path)
    family = FAMILIES[name]
    assert relative_error(run_family(patcher, family), run_family(dense, family)) < 1e-5
    return patcher


def test_a_model_runs_as_in_the_host_and_stays_packed(model):
    name, patcher, dense, weights, size = model
    family = FAMILIES[name]
    assert relative_error(run_family(patcher, family), run_family(dense, family)) < 1e-5
    params = dict(patcher.model.diffusion_model.named_parameters())
    blocks = [key for key, values in weights.items() if values.ndim == 2 and (
        "block" in key or "layers." in key)]
    assert len(blocks) > 10 and all(is_packed(params[key]) for key in blocks)
    for key, tensor in params.items():  # and each weight by itself
        values = tensor.dequantize() if is_packed(tensor) else tensor
        assert relative_error(values.float(), weights[key]) < 1e-6, key
    assert patcher.model_size() <= MOST_HELD * size


@pytest.mark.parametrize(("dtype", "is_first_version"), [
    (torch.bfloat16, False), (torch.float16, True)])
def test_names_of_both_versions_and_both_dtypes_are_read(dtype, is_first_version, path):
    model = quantized(FLUX, "int4", is_first_version=is_first_version, dtype=dtype)
    assert_same(FLUX, path, writer.write(path, model))


def test_z_image_with_plain_refiners_is_read(path):
    model = quantized("z-image", "int4", skip_refiners=True)
    assert_same("z-image", path, writer.write(path, model))


def test_biases_of_zeros_that_the_model_does_not_have_are_dropped(path, caplog):
    model = quantized("z-image", "int4")
    tensors = dict(model.tensors)
    for name in model.tensors:
        if name.endswith(".qweight"):
            rows = len(model.tensors[name])
            tensors[name.replace("qweight", "bias")] = torch.zeros(rows, dtype=torch.bfloat16)
    save_file(tensors, path)
    assert_same("z-image", path, model.values)
    assert "unet unexpected" not in caplog.text


def test_folders_of_two_files_are_read(tmp_path):
    model = quantized(FLUX, "int4", is_first_version=True)
    blocks = {name: tensor for name, tensor in model.tensors.items() if "blocks." in name}
    others = {name: tensor for name, tensor in model.tensors.items() if name not in blocks}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    save_file(others, tmp_path / "unquantized_layers.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (tmp_path / "comfy_config.json").write_text("{}")
    assert_same(FLUX, tmp_path, model.values)
    (tmp_path / "transformer_blocks.safetensors").unlink()
    with pytest.raises(ValueError, match="missing in it: transformer_blocks.safetensors"):
        load_diffusion_model(tmp_path)


@pytest.mark.parametrize("name", [FLUX, "qwen-image"])
def test_folders_of_nunchaku_lite_are_read(name, tmp_path):
    """Their modulations are in order and nothing is fused, added or shifted."""
    weights = weights_of(name)
    linear = [key.removesuffix(".weight") for key, tensor in weights.items()
              if tensor.ndim == 2 and key.endswith(".weight") and "blocks." in key]
    modulations = [layer for layer in linear if "norm" in layer or "_mod" in layer]
    targets = [layer for layer in linear if layer not in modulations]
    model = writer.lite(weights, targets, modulations)
    save_file(model.tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {
        "quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "int4", "targets": targets}}}))
    assert_same(name, tmp_path, model.values)


def test_weights_stay_as_they_are_when_others_are_packed(path):
    model = quantized(FLUX, "int4")
    writer.write(path, model)
    dense, _ = dense_of(FLUX, model.values)
    patcher, family = load(FLUX, path, pack_to="Q8_0"), FAMILIES[FLUX]
    assert relative_error(run_family(patcher, family), run_family(dense, family)) < 1e-5


def test_two_loras_and_a_dora_are_exact(model):
    name, patcher, dense, weights, _ = model
    family = FAMILIES[name]
    without = run_family(dense, family)
    loras = [(lora_for(weights, seed=seed, size=0.1), strength)
             for seed, strength in ((1, 0.8), (2, -0.5))]
    stacks = [loras, [*loras, (lora_for(weights, "dora", seed=3, size=0.1), 0.6)]]
    for stack in stacks:
        expected = run_family(patched(dense, *stack), family)
        assert error_by_effect(
            run_family(patched(patcher, *stack), family), expected, without) < LIMIT
    # another strength, and none
    loras[0] = loras[0][0], 0.3
    expected = run_family(patched(dense, *loras), family)
    assert error_by_effect(run_family(patched(patcher, *loras), family), expected, without) < LIMIT
    assert relative_error(run_family(patcher, family), without) < 1e-5


def of_layers(weights, *parts):
    """Layers of a model whose names have one of `parts` in them."""
    return {key: values for key, values in weights.items()
            if values.ndim == 2 and any(part in key for part in parts)}


@pytest.mark.parametrize(("name", "parts"), [
    (FLUX, ("qkv", "linear1")), (FLUX, ("attn.proj", "linear2")), ("qwen-image", ("_v",)),
    ("qwen-image", ("to_v", "add_v_proj")), ("qwen-image", ("to_out", "to_add_out")),
    ("z-image", ("attention.qkv",)), ("z-image", ("attention.out",)),
], ids=lambda value: "+".join(value) if isinstance(value, tuple) else value)
def test_loras_on_layers_that_were_fused_are_exact(name, parts, path):
    model = quantized(name, "int4")
    writer.write(path, model)
    dense, weights = dense_of(name, model.values)
    family, lora = FAMILIES[name], lora_for(of_layers(weights, *parts), size=2.0)
    patcher, without = load(name, path), run_family(dense, FAMILIES[name])
    expected = run_family(patched(dense, (lora, 0.8)), family)
    assert ((run_family(patched(patcher, (lora, 0.8)), family) - expected).norm()
            / (expected - without).norm()) < LIMIT


def in_diffusers_style(weights, table, prefix):
    """A LoRA of q, k and v apart."""
    stored = in_diffusers_names(weights, table)
    layers = {key.removesuffix(".weight"): values for key, values in stored.items()
              if values.ndim == 2 and "blocks." in key and key.endswith(".weight")
              and "norm" not in key}
    lora = {}
    for index, (layer, values) in enumerate(layers.items()):
        tensors = adapter("lora", values, index, size=0.1)
        lora[f"{prefix}{layer}.lora_A.weight"] = tensors["lora_down.weight"]
        lora[f"{prefix}{layer}.lora_B.weight"] = tensors["lora_up.weight"]
    return lora


def test_a_lora_on_q_k_and_v_apart_is_exact(path):
    model, family = quantized(FLUX, "int4"), FAMILIES[FLUX]
    writer.write(path, model)
    dense, weights = dense_of(FLUX, model.values)
    lora = in_diffusers_style(weights, table_of(FLUX), "transformer.")
    patcher = load_diffusion_model(path)
    without = run_family(dense, family)
    expected = run_family(patched(dense, (lora, 0.8)), family)
    assert error_by_effect(
        run_family(patched(patcher, (lora, 0.8)), family), expected, without) < LIMIT


def test_a_lora_hook_is_exact(model):
    name, patcher, dense, weights, _ = model
    family, lora = FAMILIES[name], lora_for(weights, seed=4, size=0.1)
    (plain, hooked, after), (dense_plain, dense_hooked, _) = (
        run_hooked(one, family, lora, 0.8) for one in (patcher, dense))
    assert error_by_effect(hooked, dense_hooked, dense_plain) < LIMIT
    assert torch.equal(after, plain)


@pytest.mark.parametrize("layer", [
    "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "double_blocks.0.img_mod.lin",
    "single_blocks.0.linear1", "single_blocks.0.linear2"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_weak_lora_keeps_its_strength_in_bfloat16(layer, precision, path):
    writer.write(path, quantized(FLUX, precision))
    params = dict(load_diffusion_model(path).model.diffusion_model.named_parameters())
    weight = relabel(params[f"{layer}.weight"].detach(), dtype=torch.bfloat16)
    rows, columns = weight.shape
    norm = relabel(weight, dtype=torch.float32).dequantize().norm()
    gain, generator = Gain(), torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
    up *= 0.001 * norm / (up @ down).norm()

    def run(input, sign):
        branch = LowRank.from_factors([(sign * up, down, (0, rows))], rows, torch.bfloat16)
        return product.linear(input, weight, low_rank=branch).float()

    change = 2 * up @ down
    for _ in range(-(-(1 << 23) // (rows * 2048))):
        input = torch.randn(2048, columns, generator=generator).bfloat16()
        gain.add(run(input, 1) - run(input, -1), input.float() @ change.t())
    assert 0.98 < gain.value < 1.02


def test_an_inspection_and_the_log_name_family_and_rank(path, caplog):
    writer.write(path, quantized(FLUX, "int4"))
    inspection = identify(file_contents(path))
    assert inspection.host == "Flux" and not inspection.problem
    assert {"SVDQuant int4, rank 16", "AWQ int4"} <= set(inspection.types)
    with caplog.at_level(logging.INFO):
        assert "SVDQuant int4, rank 16" in memory_summary(load_diffusion_model(path))
    assert "SVDQuant int4, rank 16 10," in caplog.text
