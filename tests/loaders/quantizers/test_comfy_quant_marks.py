"""ComfyUI's own formats as tools leave their marks: by tensors, by metadata or by a marker, under
other names than the weights', of another kind than the codes."""
import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from host_formats import HOST_FORMATS
from marked_flux import CHECKPOINT, Tensors, flux_in, old_scaled, weight_error, write
from pack_api import COMFYUI, WeightFileError, load_diffusion_model
from patched_models import tiny_flux

pytestmark = pytest.mark.usefixtures("small_models")

FORMATS = [name for name in ("float8_e4m3fn", "int8_tensorwise", "nvfp4") if name in HOST_FORMATS]
LOADS: dict[str, tuple[Callable, float]] = {  # and the error that packing adds
    "exact": (load_diffusion_model, 1e-6),
    "by ComfyUI": (lambda path: load_diffusion_model(path, host_formats=COMFYUI), 1e-6),
    "packed": (lambda path: load_diffusion_model(path, pack_to="Q8_0"), 0.02),
}
loads = pytest.mark.parametrize("load", LOADS)

def checked(path: str, load: str, values: Tensors):
    function, limit = LOADS[load]
    patcher = function(path)
    assert weight_error(patcher, values) < limit
    return patcher


@loads
def test_a_bare_marker_of_any_value_marks_weights_with_a_prefix_too(load, tmp_path):
    stored, values = old_scaled(torch.float8_e4m3fn, None)
    stored = {CHECKPOINT + name: value for name, value in stored.items()}
    stored["scaled_fp8"] = torch.full((2,), math.nan).to(torch.float8_e4m3fn)
    checked(write(tmp_path / "flux.safetensors", stored), load, values)


@loads
@pytest.mark.parametrize(("place", "stored_kind", "marked"), [
    ("tensors", "float8_e4m3fn", "float8_e5m2"), ("metadata", "float8_e5m2", "float8_e4m3fn")])
def test_the_codes_say_which_kind_of_fp8_they_are(place, stored_kind, marked, load, tmp_path):
    stored, settings, values = flux_in(stored_kind)
    marks = {key: {"format": marked} for key in settings}
    path = write(tmp_path / "flux.safetensors", stored, marks if place == "metadata" else None,
                 marks if place == "tensors" else None)
    checked(path, load, values)


@loads
@pytest.mark.parametrize(("stored_format", "marked"), [
    ("int8_tensorwise", "float8_e4m3fn"), ("nvfp4", "int8_tensorwise")])
def test_codes_under_the_mark_of_other_ones_are_a_sentence(stored_format, marked, load, tmp_path):
    stored, settings, _ = flux_in(stored_format)
    path = write(tmp_path / "flux.safetensors", stored,
                 marks={key: {"format": marked} for key in settings})
    with pytest.raises(WeightFileError, match=f"flux.safetensors: .*weight'.*{marked}"):
        LOADS[load][0](path)


@loads
@pytest.mark.parametrize(("of_tensors", "of_metadata"), [
    (CHECKPOINT, ""), ("", CHECKPOINT), ("", "diffusion_model."), (CHECKPOINT, "transformer."),
    (CHECKPOINT, CHECKPOINT)])
def test_metadata_means_the_layers_whatever_stands_before_their_names(
        of_tensors, of_metadata, load, tmp_path):
    stored, settings, values = flux_in(random.choice(FORMATS))
    layers = {of_metadata + layer: given for layer, given in settings.items()}
    checked(write(tmp_path / "flux.safetensors", stored, layers, prefix=of_tensors), load, values)


@loads
def test_metadata_may_name_weights_instead_of_layers(load, tmp_path):
    stored, settings, values = flux_in("int8_tensorwise")
    layers = {f"{layer}.weight": given for layer, given in settings.items()}
    checked(write(tmp_path / "flux.safetensors", stored, layers), load, values)


@loads
def test_layers_that_the_metadata_lacks_are_read_by_their_scales(load, tmp_path):
    stored, settings, values = flux_in(random.choice(["float8_e4m3fn", "int8_tensorwise"]))
    some = dict(list(settings.items())[::2])
    checked(write(tmp_path / "some.safetensors", stored, some), load, values)
    checked(write(tmp_path / "none.safetensors", stored, {}), load, values)


@loads
def test_metadata_and_tensors_that_say_different_things_are_a_sentence(load, tmp_path):
    stored, settings, _ = flux_in("int8_tensorwise")
    path = write(tmp_path / "flux.safetensors", stored,
                 {key: {"format": "float8_e4m3fn"} for key in settings}, settings)
    with pytest.raises(WeightFileError, match="'float8_e4m3fn' by its metadata and in"
                                              " 'int8_tensorwise' by its comfy_quant"):
        LOADS[load][0](path)


@loads
def test_a_mark_that_says_nothing_of_a_dense_layer_is_left_out(load, tmp_path):
    data = random.choice([b"null", b"null\0\0"])
    values = {name: value.bfloat16().float() for name, value in tiny_flux().items()}
    layers = [name.removesuffix(".weight") for name, value in values.items() if value.ndim == 2]
    checked(write(tmp_path / "flux.safetensors", values, marks=dict.fromkeys(layers, data)), load,
            values)


@loads
def test_a_mark_that_ends_in_zeros_is_read(load, tmp_path):
    stored, settings, values = flux_in("int8_tensorwise")
    marks = {layer: json.dumps(given).encode() + bytes(7) for layer, given in settings.items()}
    checked(write(tmp_path / "flux.safetensors", stored, marks=marks), load, values)


@loads
def test_scales_of_inputs_that_are_no_number_are_a_sentence(load, tmp_path):
    stored, _ = old_scaled(torch.float8_e4m3fn)
    name = next(name for name in stored if name.endswith(".scale_weight"))
    name = name.replace("scale_weight", "scale_input")
    path = write(tmp_path / "flux.safetensors", stored | {name: torch.ones(4)})
    with pytest.raises(WeightFileError, match=r"scale_input' is float32 \(4,\), expected one"):
        LOADS[load][0](path)


def test_metadata_of_layers_that_are_not_there_is_told(tmp_path):
    stored, settings, values = flux_in("int8_tensorwise")
    path = write(tmp_path / "flux.safetensors", stored, settings | {"gone": {"format": "x"}})
    checked(path, "exact", values)
