"""One choice, `compute`: automatic, exact or fast; and what earlier workflows meant with two."""
import re
from pathlib import Path

import nunchaku_writer
import pytest
import torch
from model_folders import use_folder
from nunchaku_models import load, quantized
from pack_api import AUTOMATIC, COMFYUI, EXACT, FAST, host_multiplies, is_packed
from pack_nodes import node_list
from patched_models import flux_file, packed_flux

from featherweight.loaders.comfyui.compute import COMPUTE_CHOICES, FOLLOW_COMPUTE, computing
from featherweight.loaders.comfyui.load_check import patcher_of
from featherweight.loaders.models import fit_device
from featherweight.loaders.models.fit_device import faster_type_text
from featherweight.ops.layers import fast_by_kitchen
from featherweight.ops.layers.packed_layers import PackedLinear

pytestmark = pytest.mark.usefixtures("small_models")
NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}
OLD_COMPUTE = ("exact", "int8", "float32")  # options of earlier versions
OLD_HOST_FORMATS = ("automatic", "exact, from the file's weights", "as ComfyUI computes them")
TODAY = {"int8": FAST, OLD_HOST_FORMATS[1]: EXACT}
WITH_COMPUTE = ("FeatherweightLoadDiffusionModel", "FeatherweightLoadCheckpoint",
                "FeatherweightLoadTextEncoder")


ALL = (*WITH_COMPUTE, "FeatherweightLoadControlNet", "FeatherweightLoadModelPatch",
       "FeatherweightLoadCLIPVision")


def inputs_of(node_id: str) -> dict:
    return {one.id: one for one in NODES[node_id].GET_SCHEMA().inputs}


@pytest.mark.parametrize("node_id", ALL)
def test_every_loader_offers_automatic_exact_and_fast(node_id):
    compute = inputs_of(node_id)["compute"]
    assert compute.default == AUTOMATIC and compute.options[:3] == ["automatic", "exact", "fast"]


@pytest.mark.parametrize("node_id", WITH_COMPUTE)
def test_the_second_choice_of_earlier_versions_is_hidden(node_id):
    host_formats = inputs_of(node_id)["host_formats"]
    assert host_formats.default == FOLLOW_COMPUTE and host_formats.as_dict()["hidden"]


@pytest.mark.parametrize("host_formats", OLD_HOST_FORMATS)
@pytest.mark.parametrize("compute", OLD_COMPUTE)
def test_the_nine_old_pairs_mean_what_they_meant(compute, host_formats):
    assert computing(compute, host_formats) == (
        TODAY.get(compute, compute), TODAY.get(host_formats, host_formats))


@pytest.mark.parametrize("choice", COMPUTE_CHOICES)
def test_a_choice_alone_means_an_arithmetic_and_who_computes_comfyuis_formats(choice):
    arithmetic, host_formats = computing(choice, FOLLOW_COMPUTE)
    assert arithmetic in (AUTOMATIC, EXACT, FAST, "float32")
    assert host_formats in (AUTOMATIC, EXACT)
    assert (host_formats == EXACT) == (choice in ("exact", "float32"))
    assert (arithmetic == FAST) == (choice in ("fast", "int8"))


@pytest.fixture(scope="module")
def fp8_file():
    return Path(flux_file("float8_e4m3fn")[0])


@pytest.mark.parametrize(("given", "arithmetic", "host_formats"), [
    ({}, "exact", AUTOMATIC),  # as prompts of 0.2.1 that leave both out
    ({"compute": "exact"}, "exact", AUTOMATIC),  # as prompts of 0.2.1
    ({"compute": "int8"}, FAST, AUTOMATIC),
    ({"compute": "exact", "host_formats": COMFYUI}, "exact", COMFYUI),
    ({"compute": "exact", "host_formats": FOLLOW_COMPUTE}, "exact", EXACT),
    ({"compute": "automatic", "host_formats": FOLLOW_COMPUTE}, "automatic", AUTOMATIC),
    ({"compute": "fast", "host_formats": FOLLOW_COMPUTE}, FAST, AUTOMATIC),
])
def test_the_node_loads_as_its_inputs_say(given, arithmetic, host_formats, fp8_file, monkeypatch):
    use_folder(fp8_file.parent, monkeypatch)
    node = NODES["FeatherweightLoadDiffusionModel"]
    model = patcher_of(node.execute(model_name=fp8_file.name, **given).args[0])
    options = model.cached_patcher_init[0].options
    assert options["compute"] == arithmetic
    assert options.get("host_formats", AUTOMATIC) == host_formats


@pytest.mark.parametrize(("compute", "has_kernels", "by_kitchen"), [
    ("automatic", True, True), ("automatic", False, False), ("exact", True, False)])
def test_automatic_leaves_svdquant_to_comfy_kitchen_where_it_has_the_kernels(
        compute, has_kernels, by_kitchen, tmp_path, monkeypatch):
    if has_kernels:
        monkeypatch.setattr(fast_by_kitchen, "BACKENDS", ("eager",))
    nunchaku_writer.write(tmp_path / "model.safetensors", quantized("flux-dev", "int4"))
    patcher = load("flux-dev", tmp_path / "model.safetensors", compute=compute)
    layers = [layer for layer in patcher.model.modules() if isinstance(layer, PackedLinear)
              and is_packed(layer.weight)]
    chosen = {layer.compute == FAST for layer in layers
              if fast_by_kitchen.product_of(layer.weight.params.format)}
    assert chosen == {by_kitchen}
    assert not any(layer.compute == FAST for layer in layers
                   if not fast_by_kitchen.product_of(layer.weight.params.format))


def test_fast_names_the_type_that_is_faster_where_it_fits(monkeypatch):
    model = packed_flux("Q8_0")
    assert faster_type_text(model, "fast") is None  # a CPU has no kernel of ComfyUI's
    monkeypatch.setattr(fit_device, "host_multiplies", lambda name, device: True)
    monkeypatch.setattr(fast_by_kitchen, "why_not_fast", lambda device, dtype: "kernels are off")
    assert faster_type_text(model, "fast") is None  # it would be ComfyUI's kernels too
    monkeypatch.setattr(fast_by_kitchen, "why_not_fast", lambda device, dtype: "")
    assert faster_type_text(model, "exact") is None
    assert re.match(r"With int8_convrot at `pack to` \([\d.]+ MB\) ComfyUI's kernels compute it",
                    faster_type_text(model, "fast"))
    monkeypatch.setattr(fit_device, "total_memory", lambda *_: 1e6)
    assert faster_type_text(model, "fast") is None


def test_comfyui_has_no_kernel_on_a_cpu():
    assert not host_multiplies("int8_tensorwise", torch.device("cpu"))
