"""Packed weights under dynamic VRAM, which comfy-aimdo reads from their files: with the real one,
on a GPU made of memory."""
import os
import shutil
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from pack_api import is_packed, load_diffusion_model
from patched_models import flux_file, packed_layers, run

from featherweight.loaders.comfyui import keep_packed
from featherweight.loaders.comfyui.file_slices import SLICE, stream_from_files

pytestmark = [pytest.mark.fake_gpus(dynamic=True), pytest.mark.usefixtures("small_models")]


@pytest.fixture(params=["gguf", "safetensors"])
def path(request, tmp_path):
    """A packed file of a small Flux, in both containers."""
    source, _ = flux_file("Q8_0" if request.param == "gguf" else "INT8")
    return Path(shutil.copy(source, tmp_path / f"flux.{request.param}"))


@pytest.fixture
def reads(monkeypatch):
    """The sizes of what comfy-aimdo has read from files, by way of ComfyUI."""
    read, found = comfy.memory_management.read_tensor_file_slice_into, {True: [], False: []}

    def watched(tensor, *args, **kwargs):
        done = read(tensor, *args, **kwargs)
        if is_packed(tensor):
            found[done].append(tensor._qdata.nbytes)
        return done

    monkeypatch.setattr(comfy.memory_management, "read_tensor_file_slice_into", watched)
    return found


def test_every_packed_weight_is_read_from_its_file(path, reads):
    expected = run(load_diffusion_model(str(path), model_options={
        "load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}))
    assert not any(reads.values())
    patcher = load_diffusion_model(str(path))
    assert patcher.is_dynamic()
    out = run(patcher)
    assert reads[True] and not reads[False]
    assert set(reads[True]) == {layer.weight._qdata.nbytes for layer in packed_layers(patcher)}
    torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


def test_the_file_that_was_mapped_is_read_whatever_has_its_name_by_now(path, reads, tmp_path,
                                                                      monkeypatch):
    other = Path(shutil.copy(path, tmp_path / "other"))
    expected = run(load_diffusion_model(str(path)))

    def replaced_before(model):
        os.replace(other, path)
        stream_from_files(model)

    reads[True].clear()
    late = load_diffusion_model(str(path))
    monkeypatch.setattr(keep_packed, "stream_from_files", replaced_before)
    early = load_diffusion_model(str(path))
    assert {hasattr(layer.weight._qdata.untyped_storage(), SLICE)
            for layer in packed_layers(early)} == {False}
    assert torch.equal(run(late), expected) and reads[True]
