"""Measure Speed: what is measured, what is left out and why, and what the JSON holds."""
import json
import re

import comfy.model_management
import pytest
import torch
from lora_models import pairs, weight_shapes
from model_folders import use_folder
from patched_models import flux_file, packed_flux
from safetensors.torch import save_file

from devtools.files import tiny_models
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.speed import measurement, ways
from featherweight.loaders.speed.measurement import Measurement, Row, measure_speed
from featherweight.loaders.speed.report import _without_paths, report_text
from featherweight.loaders.speed.ways import NotMeasured, computing
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.measure_speed import MeasureSpeed
from featherweight.ops import kernels
from featherweight.ops.layers import int8
from featherweight.ops.layers.packed_layers import PackedLayer
from featherweight.ops.tensor.packed_layout import is_comfy_quantized

pytestmark = pytest.mark.usefixtures("small_models")
LATENT = {"samples": torch.zeros(1, 16, 8, 8)}
HAS_VNNI = int8.multiplies_integers(torch.device("cpu"))
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="the CPU has no units for int8")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(measurement, "MAX_STEPS", 2)


def with_lora(model, folder, monkeypatch):
    use_folder(folder, monkeypatch)
    names = {f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}": shape
             for name, shape in weight_shapes(model.model, "blocks.").items()}
    save_file(pairs(names, rank=4), folder / "my_secret_lora.safetensors")
    return ApplyLora.execute(model, "my_secret_lora.safetensors", 1.0).args[0]


def seconds_of(rows) -> dict:
    return {(row.way, row.has_loras): len(row.seconds) for row in rows}


@needs_vnni
def test_a_model_with_loras_is_measured_in_each_way_without_and_with_them(tmp_path, monkeypatch):
    model = with_lora(packed_flux("Q8_0"), tmp_path, monkeypatch)
    rows = measure_speed(model, latent=LATENT).rows
    assert seconds_of(rows) == {(way, has): 2 for way in ways.WAYS for has in (False, True)}
    held = {(row.way, row.has_loras): row.held for row in rows}
    assert held["exact", False] < held["exact", True] < held["dense", False]
    assert all(row.peak > 0 and not row.reason for row in rows)


def test_the_model_is_afterwards_as_it_was(tmp_path, monkeypatch):
    model = with_lora(packed_flux("Q8_0"), tmp_path, monkeypatch)
    layers = [layer for layer in model.model.modules() if isinstance(layer, PackedLayer)]
    patches = dict(model.patches)
    layers[0].compute = "int8"  # as a model of which one layer was loaded so
    measure_speed(model, latent=LATENT)
    assert [layer.__dict__.get("compute") for layer in layers] == (
        ["int8"] + [None] * (len(layers) - 1))
    assert model.patches == patches


@pytest.mark.parametrize("way", [ways.EXACTLY, ways.FAST])
def test_a_way_begins_when_its_kernels_are_decided(way, monkeypatch):
    model, decided = packed_flux("Q8_0"), []
    monkeypatch.setattr(kernels, "decide",
                        lambda device, needed, makes_room: decided.extend(needed))
    with computing(model, way):
        capabilities = {capability for capability, *_ in decided}
    assert ("int8_rows" in capabilities) == (way == ways.FAST) and "linear" in capabilities


@needs_vnni
def test_fast_is_the_integer_product_and_its_distance_from_exact_is_told():
    model = packed_flux("Q8_0")
    with computing(model, ways.FAST):
        assert {layer.compute for layer in model.model.modules()
                if isinstance(layer, PackedLayer)} == {"int8"}
    latent = {"samples": torch.zeros(1, 16, 64, 64)}  # few rows are multiplied in float
    decibels, largest = measure_speed(model, latent=latent).difference
    assert 20 < decibels < 60 and 0 < largest < 0.1


def test_the_dense_model_is_comfyuis_with_the_same_values():
    path, values = flux_file("Q8_0")
    with computing(load_diffusion_model(path), ways.DENSE) as dense:
        weights = dense.model.diffusion_model.state_dict()
        assert not any(isinstance(layer, PackedLayer) for layer in dense.model.modules())
        names = weights.keys() & values.keys()  # the host renames norms
        assert {name for name, value in values.items() if value.ndim > 1} <= names
        for name in names:
            torch.testing.assert_close(weights[name], values[name].to(weights[name].dtype))


@pytest.mark.parametrize("way", [ways.EXACTLY, ways.FAST])
def test_layers_that_comfyui_computes_without_a_kernel_are_loaded_again_for_our_ways(way):
    path, _ = flux_file("float8_e4m3fn")
    model = load_diffusion_model(path, host_formats="as ComfyUI computes them")
    assert any(map(is_comfy_quantized, model.model.parameters()))
    with computing(model, way) as again:
        assert again.model is not model.model
        assert not any(map(is_comfy_quantized, again.model.parameters()))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda model: setattr(model, "cached_patcher_init", None), "another loader"),
    (lambda model: model.cached_patcher_init[0].options.update(pack_to="int8_convrot"),
     "save it and load the saved file"),
])
def test_a_way_that_needs_the_file_says_why_it_is_not_measured(change, reason):
    path, _ = flux_file("float8_e4m3fn")
    model = load_diffusion_model(path, host_formats="as ComfyUI computes them")
    change(model)
    rows = measure_speed(model, latent=LATENT).rows
    assert reason in {row.way: row.reason for row in rows}["exact"]


def test_dense_weights_that_do_not_fit_are_not_made(monkeypatch):
    model = packed_flux("Q8_0")
    with (
        monkeypatch.context() as patch,
        pytest.raises(NotMeasured, match=r"of dense weights do not fit into the 1\.1 GB of CPU"),
    ):
        patch.setattr(comfy.model_management, "get_free_memory", lambda *_: ways.SPARE_BYTES)
        with computing(model, ways.DENSE):
            pass


def test_a_dense_model_has_no_other_ways(tmp_path):
    values = {name: torch.from_numpy(value) for name, value in tiny_models.flux(
        hidden=256, double_blocks=1, single_blocks=1, context=256).items()}
    save_file(values, tmp_path / "dense.safetensors")
    rows = measure_speed(load_diffusion_model(tmp_path / "dense.safetensors"), latent=LATENT).rows
    reasons = {row.way: row.reason for row in rows}
    assert reasons == {"exact": "", "fast": "it is the same as exact on this device",
                       "dense": "its weights are dense already"}


def test_what_the_time_does_not_allow_is_not_begun():
    rows = measure_speed(packed_flux("Q8_0"), latent=LATENT, budget=-1).rows
    of_fast = set() if HAS_VNNI else {"it is the same as exact on this device"}
    assert {row.reason for row in rows} == {"no time was left", *of_fast}


def test_the_json_has_figures_and_versions_and_no_names_paths_or_prompts(tmp_path, monkeypatch):
    model = with_lora(packed_flux("Q8_0"), tmp_path, monkeypatch)
    text, picture, line = MeasureSpeed.execute(model, latent=LATENT).args
    figures = json.loads(line)
    assert len(figures["rows"]) == 6 and figures["model"]["loras"] == 1
    assert figures["versions"].keys() >= {"Featherweight", "ComfyUI", "comfy-kitchen", "torch"}
    assert figures["model"]["formats"]["Q8_0"] > 0.9 and figures["latent"] == [1, 16, 8, 8]
    assert "secret" not in line and str(tmp_path) not in line and ".gguf" not in line
    assert re.search(r"exact, with LoRAs: [\d.e-]+ s a step, [\d.]+ times as long as exact",
                     text)
    assert "The LoRAs cost" in text and picture.shape[0] == 1 and picture.shape[2] == 960


@pytest.mark.parametrize(("fast", "verdict"), [
    (0.1, "fast is 2.00 times as fast as exact here."),
    (0.2, "Take exact: fast is not faster here."),
    (0.3, "Take exact: fast is slower here (1.50 times as long)."),
    (None, "exact and fast are one here: leave compute at automatic.")])
def test_the_first_line_says_which_compute_to_take(fast, verdict):
    rows = [Row("exact", False, (0.2,) * 3)]
    rows += [] if fast is None else [Row("fast", False, (fast,) * 3)]
    text = report_text(Measurement(tuple(rows), (1, 4, 8, 8), None, 1.0),
                       {"device": {"type": "cpu"}})
    assert text.splitlines()[0] == verdict


def test_it_measures_at_each_run():
    assert MeasureSpeed.fingerprint_inputs() != MeasureSpeed.fingerprint_inputs()


@pytest.mark.parametrize("path", [
    "/mnt/models/x.gguf", r"C:\ComfyUI\my model.gguf", "~/x", "./x.so", r"\\server\share\x"])
def test_paths_in_a_reason_are_left_out_of_the_json(path):
    assert _without_paths(f"nvrtc failed in {path} (ROCm/HIP)").replace("model.gguf ", "") == (
        "nvrtc failed in … (ROCm/HIP)")
