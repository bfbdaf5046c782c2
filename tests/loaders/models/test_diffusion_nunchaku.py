"""Diffusion models that Nunchaku quantised run as the host runs their values, and stay packed."""
import logging

import nunchaku_writer as writer
import pytest
import torch
from diffusers_names import in_diffusers_names
from families import FAMILIES, relative_error
from families import run as run_family
from hooked import run_hooked
from lora_gain import Gain
from nunchaku_models import dense_of, load, quantized, table_of
from pack_api import load_diffusion_model, memory_summary, product, relabel
from patched_models import LIMIT, adapter, error_by_effect, lora_for, patched

from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.inspect.identify import identify
from featherweight.ops.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("small_models")

FLUX = "flux-dev"
MODELS = [(name, precision) for name in writer.WRITERS for precision in ("int4", "nvfp4")]
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


def test_weights_stay_as_they_are_when_others_are_packed(path):
    model = quantized(FLUX, "int4")
    writer.write(path, model)
    dense, _ = dense_of(FLUX, model.values)
    patcher, family = load(FLUX, path, pack_to="Q8_0"), FAMILIES[FLUX]
    assert relative_error(run_family(patcher, family), run_family(dense, family)) < 1e-5


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
