"""What an inspection warns of: files that draw badly, with what to take instead, and no others."""
import re

import pytest
import torch
from host_formats import mark_of
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text, summary

NORM = "single_blocks.0.norm.query_norm.scale"
STEM = NORM.removesuffix(".scale")  # the host has .weight
WEIGHT = "double_blocks.0.img_mlp.0.weight"
FP8 = torch.float8_e4m3fn


@pytest.fixture
def model():
    weights = tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1)
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def as_arrays(weights):
    return {name: weight.numpy() for name, weight in weights.items()}


def gguf(tmp_path, weights, of_vectors="F32", of_matrices="Q8_0"):
    def type_of(name, values):
        if values.shape[-1] % 32:
            return "F32"
        return of_vectors if values.ndim == 1 else of_matrices
    path = tmp_path / "model.gguf"
    write_gguf(path, as_arrays(weights), type_of)
    return path


def safetensors(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def the_warning(path) -> str:
    inspection, = inspect(path)
    warning, = inspection.warnings
    for text in (inspection_text(inspection), summary(inspection)):
        assert f"\nwarning: {warning}\n" in text
    return warning


@pytest.mark.parametrize("of_vectors", ["F32", "BF16", "F16", "Q8_0"])
def test_vectors_of_eight_bits_and_more_are_no_warning(of_vectors, model, tmp_path):
    inspection, = inspect(gguf(tmp_path, model, of_vectors))
    assert not inspection.warnings
    assert "warning" not in inspection_text(inspection)


@pytest.mark.parametrize("of_vectors", ["Q4_0", "Q5_0", "IQ4_NL"])
def test_vectors_below_eight_bits_are_named_with_what_to_take(of_vectors, model, tmp_path):
    warning = the_warning(gguf(tmp_path, model, of_vectors))
    count = sum(weight.ndim == 1 and len(weight) % 32 == 0 for weight in model.values())
    first = next(name for name, weight in model.items()
                 if weight.ndim == 1 and len(weight) % 32 == 0)
    assert warning.startswith(f"{count} norms, biases and other vectors are packed in less than 8")
    assert f"{first!r} in {of_vectors}" in warning
    assert "Take a file that keeps them in F32" in warning


def test_weights_of_other_sizes_than_the_models_are_named(model, tmp_path):
    model[WEIGHT] = model[WEIGHT][:-32]
    warning = the_warning(gguf(tmp_path, model))
    assert warning.startswith(f"1 weight has other sizes than the model's, such as {WEIGHT!r} of")
    assert "expected (512, 128)" in warning and "another conversion" in warning


def test_ones_in_a_shape_are_no_other_size(model, tmp_path):
    model[NORM] = model[NORM][None]
    assert not inspect(gguf(tmp_path, model))[0].warnings


def test_missing_weights_are_named(model, tmp_path):
    del model[NORM]
    warning = the_warning(gguf(tmp_path, model))
    assert warning.startswith("1 weight of the model is missing, such as") and STEM in warning


def test_a_checkpoint_is_warned_of_too(model, tmp_path):
    del model[NORM]
    parts = {"first_stage_model.decoder.conv_in.weight": torch.ones(64, 16, 3, 3)}
    parts |= {f"model.diffusion_model.{name}": weight for name, weight in model.items()}
    assert STEM in the_warning(safetensors(tmp_path, parts))


def test_codes_without_their_scales_are_named(model, tmp_path):
    matrices = [name for name, weight in model.items() if weight.ndim == 2]
    for name in matrices:
        model[name] = (model[name] / model[name].abs().max() * 448).to(FP8)
    warning = the_warning(safetensors(tmp_path, model))
    assert re.match(r"It does not load: model.safetensors: '.*' holds codes without their scales,"
                    rf" and so do {len(matrices) - 1} more", warning)


def test_whole_numbers_without_a_scale_are_named(model, tmp_path):
    model[WEIGHT] = (model[WEIGHT] * 1000).to(torch.int8)
    assert f"{WEIGHT!r} holds codes" in the_warning(safetensors(tmp_path, model))


def test_fp8_of_the_weights_themselves_and_fp8_with_scales_are_no_warning(model, tmp_path):
    plain = {name: weight.to(FP8) if weight.ndim == 2 else weight for name, weight in model.items()}
    assert not inspect(safetensors(tmp_path, plain))[0].warnings
    scale = model[WEIGHT].abs().max() / 448
    scaled = {**model, WEIGHT: (model[WEIGHT] / scale).to(FP8),
              WEIGHT.replace(".weight", ".weight_scale"): scale,
              WEIGHT.replace(".weight", ".comfy_quant"): mark_of({"format": "float8_e4m3fn"})}
    assert not inspect(safetensors(tmp_path, scaled))[0].warnings


def test_a_damaged_layer_of_comfyuis_formats_is_named(model, tmp_path):
    damaged = {**model, WEIGHT: (1 + model[WEIGHT]).to(torch.int8),
               WEIGHT.replace(".weight", ".comfy_quant"): mark_of({"format": "int8_tensorwise"})}
    warning = the_warning(safetensors(tmp_path, damaged))
    assert warning.startswith("It does not load: model.safetensors")
    assert "double_blocks.0.img_mlp.0" in warning


def test_a_weight_of_zeros_is_named(model, tmp_path):
    warning = the_warning(safetensors(tmp_path, model | {WEIGHT: torch.zeros_like(model[WEIGHT])}))
    assert warning.startswith(f"model.safetensors: {WEIGHT!r} holds nothing but zeros")
    assert "Download the file again" in warning
