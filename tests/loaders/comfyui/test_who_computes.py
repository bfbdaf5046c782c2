"""Whole models in ComfyUI's own quantised formats, computed by this pack."""
import contextlib
import functools
import itertools

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_extras.nodes_model_merging import ModelMergeSimple
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from host_formats import ASYMMETRIC
from marked_flux import flux_in, in_format, write
from pack_api import (
    AUTOMATIC,
    COMFYUI,
    EXACT,
    KEEP_TYPES,
    WeightFileError,
    host_multiplies,
    is_comfy_quantized,
    is_packed,
    load_diffusion_model,
    load_notes,
    memory_summary,
    packed_tensors,
    plan_file,
    source_of_file,
    source_of_model,
)
from packed_files import write_host_format
from patched_models import (
    LIMIT,
    dense_of,
    error_by_effect,
    lora_for,
    patched,
    relative,
    run,
    tiny_flux,
)

from featherweight.loaders.comfyui import model_summary
from featherweight.loaders.comfyui.compute import packed_formats
from featherweight.loaders.comfyui.model_summary import arithmetic_text, dequantize_backend_text
from featherweight.loaders.inspect import inspect
from featherweight.loaders.packing.save import save
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS

pytestmark = pytest.mark.usefixtures("small_models")

CPU = torch.device("cpu")
FORMATS = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4",
           ASYMMETRIC)


@functools.cache
def written(format_name: str, folder) -> tuple[str, dict]:
    """A Flux with its blocks in a format, and the dense values of all weights."""
    stored, marks, values = flux_in(format_name)
    return write(folder / f"{format_name}.safetensors", stored, marks=marks), values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("host_formats")
    written.cache_clear()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_model_draws_what_its_dense_values_draw(format_name, folder):
    path, values = written(format_name, folder)
    model = load_diffusion_model(path)
    weights = dict(model.model.diffusion_model.named_parameters())
    blocks = [name for name in values if "_blocks." in name and values[name].ndim == 2]
    assert blocks and all(is_packed(weights[name]) for name in blocks)
    assert relative(run(model), run(dense_of(values))) < 1e-5


@pytest.mark.parametrize(("kind", "format_name"), [
    *zip(itertools.cycle(["lora", "dora", "diff"]), FORMATS)])
def test_patches_are_exact(kind, format_name, folder):
    path, values = written(format_name, folder)
    ours, dense = load_diffusion_model(path), dense_of(values)
    before = {name: one._qdata.clone() for name, one in packed_weights(ours).items()}
    first, second = lora_for(values, seed=1), lora_for(values, kind, seed=2)
    for strength in (0.8, 0.3):  # a change of strength changes no weight
        loras = (first, 1.0), (second, strength)
        expected = run(patched(dense, *loras))
        assert error_by_effect(run(patched(ours, *loras)), expected, run(dense)) < LIMIT
    assert all(torch.equal(packed_weights(ours)[name]._qdata, before[name]) for name in before)


@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_device_without_int8_and_fp8_products_draws_the_same(format_name, folder, monkeypatch):
    path, values = written(format_name, folder)
    lora = lora_for(values, seed=1)
    expected = run(patched(load_diffusion_model(path), (lora, 0.7)))

    def refused(*args, **kwargs):
        raise NotImplementedError("this device has no such product")

    for product in ("_int_mm", "_scaled_mm"):
        monkeypatch.setattr(torch, product, refused)
    ours = load_diffusion_model(path)
    assert torch.equal(run(patched(ours, (lora, 0.7))), expected)
    assert {tensor.dtype for weight in packed_weights(ours).values()
            for tensor in packed_tensors(weight)} <= {torch.uint8, torch.float32}


def packed_weights(patcher) -> dict:
    return {name: weight for name, weight in patcher.model.diffusion_model.named_parameters()
            if is_packed(weight)}


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name in QUANT_ALGOS])
def test_the_user_leaves_them_to_comfyui(format_name, folder, monkeypatch):
    path, values = written(format_name, folder)
    host = comfy.sd.load_diffusion_model(path)
    ours = load_diffusion_model(path, host_formats=COMFYUI)
    assert not packed_weights(ours) and torch.equal(run(ours), run(host))
    assert dequantize_backend_text(ours) is None
    exact = load_diffusion_model(path, host_formats=EXACT)
    exactly = arithmetic_text(exact)
    assert exactly.startswith("computes exactly in ") and exactly == arithmetic_text(ours)  # a CPU
    monkeypatch.setattr(model_summary, "host_multiplies", lambda name, device: True)  # a GPU
    for layer in ours.model.modules():
        if is_comfy_quantized(getattr(layer, "weight", None)):
            layer._full_precision_mm = False  # which ComfyUI sets on a CPU
    assert arithmetic_text(ours) == f"{format_name} by ComfyUI's kernels (fast)"
    assert arithmetic_text(exact) == exactly
    assert dequantize_backend_text(exact).startswith("dequantized by ")


@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "int8_tensorwise"])
@pytest.mark.parametrize("ours", [EXACT, COMFYUI])
def test_models_in_them_merge_twice_whoever_computes_them(ours, format_name, tmp_path):
    values = [write_host_format(format_name, tmp_path / f"{seed}.safetensors", tiny_flux(seed))
              for seed in (0, 1)]
    merged, other = (load_diffusion_model(str(tmp_path / f"{seed}.safetensors"), host_formats=ours)
                     for seed in (0, 1))
    expected = values[0]
    for _ in range(2):
        merged, = ModelMergeSimple().merge(merged, other, 0.5)
        expected = {name: (value + values[1][name]) / 2 for name, value in expected.items()}
    dense = comfy.sd.load_diffusion_model_state_dict(expected)
    # ComfyUI quantises what it has merged
    assert relative(run(merged), run(dense)) < (1e-5 if ours == EXACT else 0.05)


@pytest.mark.parametrize("ours", [EXACT, COMFYUI])
def test_a_scheduled_lora_works_or_is_a_sentence(ours, tmp_path):
    values = write_host_format("float8_e4m3fn", tmp_path / "a.safetensors", tiny_flux())
    model = load_diffusion_model(str(tmp_path / "a.safetensors"), host_formats=ours).clone()
    hooks = comfy.hooks.create_hook_lora(lora_for(values), 1.0, 1.0)
    patches = comfy.lora.load_lora(hooks.hooks[0].weights,
                                   comfy.lora.model_lora_keys_unet(model.model, {}))
    hooks.hooks[0].hook_ref = comfy.hooks._HookRef()
    assert model.add_hook_patches(hooks.hooks[0], patches, 1.0)
    comfy.model_management.load_models_gpu([model])
    refused = pytest.raises(WeightFileError, match="Choose exact at `compute`")
    with contextlib.nullcontext() if ours == EXACT else refused:
        model.patch_hooks(hooks)
    model.unpatch_hooks()


@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "nvfp4", "int8_tensorwise"])
@pytest.mark.parametrize("ours", [EXACT, COMFYUI])
def test_q_k_and_v_of_diffusers_keep_their_scales(ours, format_name, tmp_path):
    table = DIFFUSERS["flux-dev"]({"depth": 1, "depth_single_blocks": 1, "hidden_size": 256})
    weights = {name.replace("_norm.scale", "_norm.weight"): value
               for name, value in tiny_flux().items()}
    stored, marks, values = in_format(in_diffusers_names(weights, table), "transformer_blocks",
                                      format_name)
    path = write(tmp_path / "a.safetensors", stored, marks=marks)
    model = load_diffusion_model(path, host_formats=ours)
    dense = comfy.sd.load_diffusion_model_state_dict(in_the_hosts_names(values, weights, table))
    assert relative(run(model), run(dense)) < 1e-5
    assert [("diffusers' names" in note) for note in load_notes(model)] == [True] * (
        ours == COMFYUI)


@pytest.mark.parametrize("ours", [EXACT, COMFYUI])
def test_scales_in_float64_are_read(ours, tmp_path):
    stored, marks, values = in_format(tiny_flux(), "", "int8_tensorwise")
    stored = {name: value.double() if name.endswith("_scale") else value
              for name, value in stored.items()}
    path = write(tmp_path / "a.safetensors", stored, marks=marks)
    model = load_diffusion_model(path, host_formats=ours)
    dense = comfy.sd.load_diffusion_model_state_dict(values)
    assert relative(run(model), run(dense)) < (1e-5 if ours == EXACT else 0.02)


@pytest.mark.parametrize(("source", "format_name"), [
    *zip(itertools.cycle(["model", "file"]), FORMATS)])
def test_a_model_in_them_is_saved_packed(source, format_name, folder, tmp_path):
    path, values = written(format_name, folder)
    source = (source_of_model(load_diffusion_model(path)) if source == "model"
              else source_of_file(path))
    exact, errors = run(dense_of(values)), {}
    for target in ("Q8_0", KEEP_TYPES):
        made = tmp_path / f"{target}.gguf"
        save(plan_file(source, made, target))
        errors[target] = relative(run(load_diffusion_model(str(made))), exact)
    assert errors["Q8_0"] < 0.02 and errors[KEEP_TYPES] < 0.01


NAMES = {name: name for name in FORMATS} | {"int8_tensorwise": "INT8_ROWS"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_inspection_and_the_loader_name_the_format(format_name, folder):
    path, values = written(format_name, folder)
    found, = inspect(path)
    assert found.title.startswith(f"{format_name}.safetensors is a diffusion model: Flux")
    blocks = [name for name in values if "_blocks." in name and values[name].ndim == 2]
    assert found.types[NAMES[format_name]][0] == len(blocks)
    assert memory_summary(load_diffusion_model(path)).startswith(NAMES[format_name])


@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "nvfp4"])
def test_a_recipe_loads_them_again_as_chosen(format_name, folder):
    path, values = written(format_name, folder)
    for choice in (EXACT, AUTOMATIC):
        patcher = load_diffusion_model(path, host_formats=choice)
        load, arguments = patcher.cached_patcher_init[:2]
        assert packed_weights(load(*arguments)).keys() == packed_weights(patcher).keys() != set()


def test_the_choice_is_the_users_and_automatic_follows_the_device(monkeypatch):
    assert packed_formats(COMFYUI, CPU) == frozenset()
    assert packed_formats(EXACT, torch.device("cuda:0")) == set(COMFYUI_FORMATS)
    for device in ("cpu", "mps", "xpu"):
        assert packed_formats(AUTOMATIC, torch.device(device)) == set(COMFYUI_FORMATS)
    capability = {"value": (8, 6)}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["value"])
    nvidia = torch.device("cuda:0")

    def by_the_host():
        return {name for name in FORMATS if host_multiplies(name, nvidia)}

    integers = {"int8_tensorwise", "convrot_w4a4", ASYMMETRIC} & set(QUANT_ALGOS)
    assert by_the_host() == integers
    capability["value"] = (8, 9)
    assert by_the_host() == integers | {"float8_e4m3fn", "float8_e5m2"}
    capability["value"] = (12, 0)
    assert by_the_host() == set(FORMATS) & set(QUANT_ALGOS)
    capability["value"] = (7, 5)
    assert by_the_host() == set()
    capability["value"] = (12, 0)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's
    assert by_the_host() == set()
