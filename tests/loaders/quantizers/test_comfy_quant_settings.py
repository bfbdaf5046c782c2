"""Every setting of a `comfy_quant` is used, meaningless, named or refused, and a mark that is lost
is guessed only where nothing else can be meant, however the model is loaded."""
import random
import re

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from encoders import ENCODERS
from host_formats import ASYMMETRIC, in_host_format
from marked_flux import (
    CHECKPOINT,
    Tensors,
    flux_in,
    in_format,
    old_scaled,
    weight_error,
    write,
)
from pack_api import (
    AUTOMATIC,
    COMFYUI,
    EXACT,
    QuantizedTensor,
    WeightFileError,
    load_diffusion_model,
    load_notes,
    load_text_encoder,
)
from patched_models import relative
from small_encoders import t5_file

from featherweight.loaders.comfyui.compute import packed_formats
from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.models import diffusion
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS
from featherweight.loaders.quantizers.comfy_quant_settings import unknown_settings
from featherweight.loaders.refusals.read_anyway import VARIABLE

pytestmark = pytest.mark.usefixtures("small_models")

# compute capabilities of RTX 20, 30, 40 and 50
CAPABILITIES = ((7, 5), (8, 6), (8, 9), (12, 0))
MODES = ("exact", "as ComfyUI", "automatic", "packed")
PLAIN = [name for name in ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise")
         if name in QUANT_ALGOS]
# which formats of ComfyUI have been seen rotated, though it reads some of them as if they were not
ROTATED = [*PLAIN, *(name for name in ("convrot_w4a4", ASYMMETRIC) if name in QUANT_ALGOS)]


@pytest.fixture
def load(monkeypatch):
    """Loads a file in one of `MODES`: of a GPU only the choice of who computes is taken."""

    def load_in(mode: str, path: str):
        if mode == "packed":
            return load_diffusion_model(path, pack_to="Q8_0")
        choice = {"exact": EXACT, "as ComfyUI": COMFYUI}.get(mode, AUTOMATIC)
        if choice == AUTOMATIC:
            capability = random.choice(CAPABILITIES)
            monkeypatch.setattr(torch.version, "cuda", "13.0")
            monkeypatch.setattr(torch.cuda, "get_device_capability",
                                lambda device: capability)
            monkeypatch.setattr(diffusion, "packed_formats", lambda formats, device: packed_formats(
                formats, torch.device("cuda:0")))
        return load_diffusion_model(path, host_formats=choice)

    return load_in


def marked(rng: random.Random, path, stored: Tensors, settings: dict[str, dict]) -> str:
    """Writes a file with its marks in one of the places where files have them."""
    prefix = rng.choice(["", "", CHECKPOINT])
    in_metadata = rng.random() < 0.5
    marks = {key: given if rng.random() < 0.5 or "convrot" in given else
             {"format": given["format"], "params": {
                 name: value for name, value in given.items() if name != "format"}}
             for key, given in settings.items()}
    return write(path, stored, marks if in_metadata else None, None if in_metadata else marks,
                 prefix=prefix)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format_name", PLAIN)
def test_rotation_is_undone_in_every_format(format_name, mode, load, tmp_path):
    rng = random.Random(f"{format_name} {mode}")
    stored, settings, values = flux_in(format_name, rng.choice([16, 64, 256]))
    patcher = load(mode, marked(rng, tmp_path / "flux.safetensors", stored, settings))
    assert weight_error(patcher, values) < (0.02 if mode == "packed" else 1e-5)
    assert not load_notes(patcher)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("format_name", PLAIN)
def test_a_text_encoder_is_read_as_a_model_is(format_name, group, tmp_path):
    rng = random.Random(f"{format_name} {group}")
    choice = rng.choice([EXACT, AUTOMATIC, COMFYUI])
    _, weights, sizes = t5_file("Q8_0", 1, 256)
    stored, settings, values = in_format(weights, ".DenseReluDense.", format_name, group)
    stored |= {name: torch.zeros(shape) for name, shape in ENCODERS["t5-xxl"].markers.items()}
    lost = rng.choice(list(settings))
    kept = {layer: given for layer, given in settings.items() if layer != lost}

    def load(marks):
        path = write(tmp_path / f"{len(marks)}.safetensors", stored, marks=marks)
        return load_text_encoder([path], "sd3", model_options=sizes, host_formats=choice)

    clip = load(settings)
    for name, weight in clip.cond_stage_model.t5xxl.transformer.named_parameters():
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        assert relative(weight, values[name]) < 1e-5, name
    if group:
        with pytest.raises(WeightFileError, match=f"'{re.escape(lost)}' has no comfy_quant"):
            load(kept)
    else:
        notes = " ".join(load_notes(load(kept).patcher))
        assert f"{lost}' has no comfy_quant" in notes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format_name", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"])
def test_scales_of_rows_are_those_of_rows_in_any_shape(format_name, mode, load, tmp_path):
    rng = random.Random(f"{format_name} {mode}")
    shape = random.choice([(-1,), (-1, 1)])
    stored, settings, values = flux_in(format_name)
    for layer in settings:
        rows = len(stored[f"{layer}.weight"])
        scale = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) / 100
        values[f"{layer}.weight"] = stored[f"{layer}.weight"].float() * scale[:, None]
        stored[f"{layer}.weight_scale"] = scale.view(shape)
    patcher = load(mode, marked(rng, tmp_path / "flux.safetensors", stored, settings))
    assert weight_error(patcher, values) < (0.02 if mode == "packed" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("marker", ["scaled_fp8", None])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_old_scaled_fp8_is_never_read_as_the_other_kind(kind, marker, mode, load, tmp_path):
    rng = random.Random(f"{kind} {marker} {mode}")
    stored, values = old_scaled(kind, marker)
    if marker:
        stored[marker] = torch.empty(rng.choice([0, 2]), dtype=rng.choice(
            [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32]))
    path = write(tmp_path / "flux.safetensors", stored, prefix=rng.choice(["", CHECKPOINT]))
    assert weight_error(load(mode, path), values) < (0.02 if mode == "packed" else 1e-6)


SILENT = {"orig_dtype": "torch.bfloat16", "orig_shape": [256, 256], "per_row": True,
          "full_precision_matrix_mult": True, "linear_dtype": "int8", "scale_dtype": "float32",
          "artifact_contract": "v1", "projection_name": "qkv", "hadamard": False, "permuted": None,
          "smoothing": "none", "transposed": 0}
CHANGING = {"hadamard": True, "rotation": "quarot", "weight_rotation": 64, "permutation": [1, 0],
            "channel_perm": True, "smoothing": 0.5, "shift": 3, "lut": [0.5], "svd_rank": 32,
            "low_rank": True, "transposed": True}


def one_setting(tmp_path, rng: random.Random, format_name: str, name: str, value) -> str:
    """A Flux in a format with a further setting in one mark."""
    stored, settings, _ = flux_in(format_name)
    settings[rng.choice(list(settings))][name] = value
    return marked(rng, tmp_path / "flux.safetensors", stored, settings)


@pytest.mark.parametrize("name", SILENT)
def test_settings_without_a_meaning_for_values_say_nothing(name, load, tmp_path):
    rng = random.Random(name)
    path = one_setting(tmp_path, rng, rng.choice(ROTATED), name, SILENT[name])
    assert not load_notes(load(rng.choice(MODES), path))


@pytest.mark.parametrize("name", CHANGING)
def test_settings_that_change_values_stop_the_load(name, load, tmp_path, monkeypatch):
    rng = random.Random(name)
    path = one_setting(tmp_path, rng, rng.choice(ROTATED), name, CHANGING[name])
    mode = rng.choice(MODES)
    with pytest.raises(WeightFileError, match=rf"^flux.safetensors: .*{name}.*{VARIABLE}=1"):
        load(mode, path)
    assert name in inspection_text(inspect(path)[0])
    monkeypatch.setenv(VARIABLE, "1")
    load(mode, path)


@pytest.mark.parametrize(("format_name", "name", "value"), [
    ("nvfp4", "group_size", 32), ("mxfp8", "block_size", 16), ("convrot_w4a4", "convrot", False),
    (ASYMMETRIC, "bits", 6), (ASYMMETRIC, "symmetric", False), (ASYMMETRIC, "convrot", False),
    ("convrot_w4a4", "weight_rotated", False)])
def test_another_value_than_the_reader_uses_stops_the_load(format_name, name, value, load,
                                                           tmp_path):
    rng = random.Random(f"{format_name} {name}")
    path = one_setting(tmp_path, rng, format_name, name, value)
    with pytest.raises(WeightFileError, match=r"^flux.safetensors: .*\. [A-Z].*\.$"):
        load(rng.choice(MODES), path)


@pytest.mark.parametrize("mode", MODES)
def test_a_setting_that_nobody_knows_is_named_and_the_file_loads(mode, load, tmp_path):
    rng = random.Random(mode)
    path = one_setting(tmp_path, rng, rng.choice(ROTATED), "made_on", "Tuesday")
    (note,) = load_notes(load(mode, path))
    assert "'made_on'" in note
    assert note in inspection_text(inspect(path)[0])


@pytest.mark.parametrize("format_name", COMFYUI_FORMATS)
def test_what_a_reader_uses_is_known(format_name):
    settings = dict.fromkeys(COMFYUI_FORMATS[format_name].settings) | {"format": format_name}
    assert not [*unknown_settings(settings)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("format_name", ROTATED)
def test_a_lost_mark_is_guessed_only_where_it_can_be_one(format_name, group, mode, load,
                                                         tmp_path):
    rng = random.Random(f"{format_name} {group} {mode}")
    is_turned = bool(group) or format_name not in PLAIN
    stored, settings, values = flux_in(format_name, group)
    lost = rng.sample(list(settings), rng.randint(1, len(settings) - 1))
    kept = {layer: given for layer, given in settings.items() if layer not in lost}
    path = marked(rng, tmp_path / "flux.safetensors", stored, kept)
    if is_turned:
        with pytest.raises(WeightFileError, match="has no comfy_quant, as other layers") as error:
            load(mode, path)
        assert re.fullmatch(rf"flux\.safetensors: .*\. [A-Z].*\. {VARIABLE}=1 in .*\.",
                            str(error.value))
        assert str(error.value) in inspection_text(inspect(path)[0])
        return
    patcher = load(mode, path)
    assert weight_error(patcher, values) < (0.02 if mode == "packed" else 1e-5)
    (note,) = load_notes(patcher)
    assert "no comfy_quant, as other layers have" in note
    assert note in inspection_text(inspect(path)[0])


def test_layers_that_cannot_be_rotated_need_no_mark_beside_rotated_ones(load, tmp_path):
    """Their columns are no whole groups."""
    stored, settings, values = flux_in("int8_tensorwise", 256)
    name = next(name for name in stored if name.endswith("img_in.weight"))
    layer = name.removesuffix(".weight")
    assert values[name].shape[1] % 256
    parts, values[name] = in_host_format(name, values[name], "int8_tensorwise")
    del parts[f"{layer}.comfy_quant"]
    path = write(tmp_path / "flux.safetensors", stored | parts, marks=settings)
    assert weight_error(load("exact", path), values) < 1e-5


def test_weights_that_need_no_scale_need_no_mark(load, tmp_path):
    rng = random.Random(0)
    stored, settings, values = flux_in("int8_tensorwise", 64)
    for layer in rng.sample(list(settings), 2):
        dtype = rng.choice([torch.bfloat16, torch.float16])
        stored[f"{layer}.weight"] = values[f"{layer}.weight"].to(dtype)
        values[f"{layer}.weight"] = stored[f"{layer}.weight"].float()
        del settings[layer], stored[f"{layer}.weight_scale"]
    patcher = load("exact", marked(rng, tmp_path / "flux.safetensors", stored, settings))
    assert weight_error(patcher, values) < 1e-5 and not load_notes(patcher)
