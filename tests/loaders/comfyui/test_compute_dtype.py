"""What a diffusion model on a CPU computes in, and who chooses it."""
import comfy.cli_args
import comfy.ops
import comfy.sd
import comfy.supported_models
import families
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from families import (
    FAMILIES,
    comfyui_gguf_style,
    random_weights,
    relative_error,
    stable_diffusion_cpp_style,
)
from pack_api import (
    FORMATS,
    QuantizedTensor,
    is_packed,
    load_diffusion_model,
    pack_tensor,
    product,
    source_of_model,
)
from pack_api import compute as compute_module
from patched_models import dense_flux, flux_file, relative, step

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.compute import (
    ATTENTION_FLAGS,
    DTYPE_FLAGS,
    compute_dtype,
)
from featherweight.loaders.comfyui.model_summary import arithmetic_text
from featherweight.loaders.packing.source import unsaved_parts
from featherweight.ops import cpu_features as cpu_features
from featherweight.ops.layers import cpu_attention as cpu_attention
from featherweight.ops.tensor.packed_layout import is_other_16bit
from featherweight.ops.tensor.packed_tensor import relabel

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


@pytest.mark.parametrize("plain", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_weights_that_lose_digits_in_bfloat16_are_told(plain, compute, tmp_path):
    weights = tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1)
    write_gguf(tmp_path / "flux.gguf", weights, lambda name, values: (
        "F32" if values.ndim < 2 else "Q8_0" if "blocks." in name else plain))
    text = arithmetic_text(load_diffusion_model(str(tmp_path / "flux.gguf"), compute=compute))
    expected = f"computes exactly in {'float32' if compute == 'float32' else 'bfloat16'}"
    is_rounded = plain == "F16" and compute == "exact"
    assert text == expected + (", to which F16 weights are rounded" if is_rounded else "")


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


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", ["sd1.5", "sdxl", "sd3.5"])
def test_16_bit_weights_of_another_type_are_converted_once(name, tmp_path, monkeypatch):
    """As a step would each time, where main memory allows it; the values stay those of the file."""
    family, path = FAMILIES[name], tmp_path / "model.gguf"
    families.shrunken_detection(family, monkeypatch)
    weights = random_weights(family)
    write_gguf(path, weights, **stable_diffusion_cpp_style("Q8_0"), metadata=family.metadata)
    arguments = families.inputs(family)
    prepared = load_diffusion_model(str(path))
    monkeypatch.setattr(compute_module, "CONVERTED_SHARE", 0)
    mapped = load_diffusion_model(str(path))
    dtype = prepared.model.get_dtype_inference()
    halves = [weight for weight in mapped.model.diffusion_model.parameters()
              if is_other_16bit(weight, dtype)]
    assert any(map(is_packed, halves)) or dtype == torch.float32
    assert prepared.model_size() == mapped.model_size()
    for (key, one), (_, other) in zip(prepared.model.named_parameters(),
                                      mapped.model.named_parameters()):
        assert not is_other_16bit(one, dtype)
        assert (one.dtype, is_packed(one)) == (other.dtype, is_packed(other)) or one.dtype == dtype
        assert torch.equal(*(product.values_of(each).to(dtype) for each in (one, other))), key
    assert relative_error(step(prepared, arguments), step(mapped, arguments)) < 1e-3
    source = source_of_model(prepared)
    assert not source.notes
    assert {weight.stored_type for weight in source.weights.values()} == {"Q8_0", "F16"}


@pytest.mark.parametrize("held", [torch.float16, torch.float32])
def test_codes_are_no_16_bit_weights_whatever_dtype_they_pass_for(held):
    values = torch.randn(16, 32).to(held)
    layout = QUANT_ALGOS["float8_e4m3fn"]["comfy_tensor_layout"]
    of_the_host = QuantizedTensor.from_float(values, layout)
    packed = relabel(pack_tensor(values.float(), FORMATS["Q8_0"]), dtype=held)
    assert of_the_host.dtype == packed.dtype == held
    assert not is_other_16bit(of_the_host, torch.bfloat16)
    assert not is_other_16bit(packed, torch.bfloat16)
    assert is_other_16bit(values, torch.bfloat16) == (held == torch.float16)
