"""Files that are saved here, in the hands of the packages that other people load them with: bit for
bit the same values.

Neither is on the package index as something that can be installed in a minute, so these tests run
where they are: COMFYUI_GGUF_PATH is the folder of a clone of ComfyUI-GGUF; stable_diffusion_cpp is
the Python package of stable-diffusion.cpp.
"""
import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from pack_api import source_of_model
from patched_models import dense_flux, flux_file, lora_for, patched
from saving import save, values_in

from featherweight.loaders.packing.planning.file_plan import SAVE_TYPES

pytestmark = pytest.mark.usefixtures("small_models")
PEER = os.environ.get("COMFYUI_GGUF_PATH")
SIZE = "a size"
each_file = pytest.mark.parametrize(
    "wanted", [*(name for name in SAVE_TYPES if name != "NF4"), SIZE])


@pytest.fixture
def saved(tmp_path, wanted) -> Path:
    """A small Flux with a LoRA on it."""
    source = source_of_model(patched(dense_flux("BF16"), (lora_for(flux_file("BF16")[1]), 0.5)))
    whole = sum(weight.values for weight in source.weights.values())
    return save(source, tmp_path / "model.gguf",
                int(whole * 0.8) if wanted == SIZE else wanted).path


def peers(module: str):
    """A module of the other pack, without registering its nodes."""
    package = sys.modules.setdefault("comfyui_gguf_peer", types.ModuleType("comfyui_gguf_peer"))
    package.__path__ = [PEER]
    return importlib.import_module(f"comfyui_gguf_peer.{module}")


@pytest.mark.skipif(not PEER, reason="COMFYUI_GGUF_PATH names no clone of ComfyUI-GGUF")
@each_file
def test_comfyui_gguf_reads_the_same_names_shapes_and_values(saved):
    found = peers("loader").gguf_sd_loader(str(saved))
    state_dict = found[0] if isinstance(found, tuple) else found
    ours = values_in(saved)
    assert state_dict.keys() == ours.keys()
    for name, tensor in state_dict.items():
        values = peers("dequant").dequantize_tensor(tensor, torch.float32, torch.float32)
        assert bool((values.reshape(ours[name].shape) == ours[name]).all()), name


@each_file
def test_stable_diffusion_cpp_reads_the_same_names_shapes_and_values(saved, tmp_path):
    reader = pytest.importorskip("stable_diffusion_cpp.stable_diffusion_cpp")
    out = tmp_path / "converted.gguf"
    assert reader.convert(
        str(saved).encode(), b"",
        str(out).encode(), reader.GGMLType.SD_TYPE_F32, b"", False)
    theirs, ours = values_in(out), values_in(saved)
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert torch.equal(values.view(ours[name].shape), ours[name]), name
