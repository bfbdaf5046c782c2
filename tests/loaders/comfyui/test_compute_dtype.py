"""What a diffusion model on a CPU computes in, and who chooses it."""
import comfy.cli_args
import comfy.ops
import comfy.sd
import comfy.supported_models
import families
import pytest
import torch
from families import FAMILIES, comfyui_gguf_style, random_weights, relative_error
from patched_models import dense_flux, flux_file, relative, step

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.compute_dtype import (
    ATTENTION_FLAGS,
    DTYPE_FLAGS,
    compute_dtype,
)
from featherweight.loaders.comfyui.model_summary import arithmetic_text
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.packing.source import unsaved_parts
from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.layers import cpu_attention as cpu_attention

OVERRIDE = "optimized_attention_override"


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """ComfyUI as it is started without flags for dtypes, on a CPU that multiplies bfloat16."""
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", False)
    monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: True)


def packed(compute="exact"):
    return load_diffusion_model(flux_file("Q8_0")[0], compute=compute)


def test_a_cpu_that_multiplies_bfloat16_computes_in_it_as_exactly_as_a_gpu():
    model = packed()
    dense = comfy.sd.load_diffusion_model_state_dict(
        dict(flux_file("Q8_0")[1]), model_options={"custom_operations": comfy.ops.manual_cast})
    assert model.model.get_dtype_inference() == torch.bfloat16
    assert arithmetic_text(model) == "computes exactly in bfloat16"
    expected = step(dense)
    dense.model.manual_cast_dtype = torch.bfloat16
    assert 0 < relative(step(model), expected) < 1.3 * relative(step(dense), expected)


def test_a_cpu_without_computes_in_float32(monkeypatch):
    monkeypatch.setattr(cpu_features, "multiplies_bfloat16", lambda: False)
    model = packed()
    assert model.model.get_dtype_inference() == torch.float32
    assert arithmetic_text(model) == "computes exactly in float32"
    assert relative(step(model), step(dense_flux("Q8_0"))) < 1e-5


def test_float32_is_computed_where_it_is_asked_for():
    model = packed("float32")
    assert arithmetic_text(model) == "computes exactly in float32"
    assert relative(step(model), step(dense_flux("Q8_0"))) < 1e-5


@pytest.mark.parametrize("compute", ["exact", "int8", "float32"])
@pytest.mark.parametrize("flag", DTYPE_FLAGS)
def test_a_flag_of_comfyui_for_dtypes_goes_first(flag, compute, monkeypatch):
    if not hasattr(comfy.cli_args.args, flag):
        pytest.skip(f"this ComfyUI has no flag {flag}")
    model = packed(compute)
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    assert compute_dtype(model, compute) is None


@pytest.mark.parametrize("flag", ATTENTION_FLAGS)
def test_a_flag_of_comfyui_for_attention_goes_first(flag, monkeypatch):
    assert packed().model_options["transformer_options"][OVERRIDE] is cpu_attention.attention
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    assert OVERRIDE not in packed().model_options["transformer_options"]


def test_a_model_that_comfyui_does_not_run_in_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(comfy.supported_models.Flux, "supported_inference_dtypes",
                        [torch.float16, torch.float32])
    assert packed().model.get_dtype_inference() == torch.float32


def test_saving_names_nothing_of_this_packs_own_as_lost():
    assert unsaved_parts(packed()) == []


def test_a_clone_keeps_dtype_and_attention():
    clone = packed().clone()
    assert clone.model.get_dtype_inference() == torch.bfloat16
    assert clone.model_options["transformer_options"][OVERRIDE] is cpu_attention.attention


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.latent])
def test_every_family_runs_in_what_its_model_computes_in(name, tmp_path, monkeypatch):
    """In bfloat16 it loses no more than ComfyUI's own model with the same values does."""
    family, path = FAMILIES[name], tmp_path / "model.gguf"
    families.shrunken_detection(family, monkeypatch)
    weights = random_weights(family)
    seen = write_gguf(path, weights, **comfyui_gguf_style(), metadata=family.metadata)
    seen = {key: values.reshape(weights[key].shape) for key, values in seen.items()}
    arguments = families.inputs(family)
    dense = families.host_patcher(seen, family)
    model = load_diffusion_model(str(path))
    dtype = model.model.get_dtype_inference()
    assert (dtype == torch.bfloat16) == (
        torch.bfloat16 in model.model.model_config.supported_inference_dtypes)
    exact = step(dense, arguments) - arguments["x"]
    error = relative_error(step(model, arguments) - arguments["x"], exact)
    if dtype == torch.float32:
        assert error < 1e-5
        return
    as_on_a_gpu = families.host_patcher(seen, family, custom_operations=comfy.ops.manual_cast)
    as_on_a_gpu.model.manual_cast_dtype = torch.bfloat16
    lost = relative_error(step(as_on_a_gpu, arguments) - arguments["x"], exact)
    assert error < 1.5 * lost + 1e-3
