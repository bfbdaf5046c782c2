"""What the loaders pack to a size by a measurement, or by an imatrix next to the model's file, is
nearer to the dense model than what they pack without."""
import os
from pathlib import Path

from devtools.measure.painter import Painter
from devtools.measure.weights import snr

import pytest
import torch
from imatrices import write_imatrix
from pack_api import load_diffusion_model

from demo_model import scenes
from featherweight.loaders.files import packed_cache
from featherweight.loaders.models import pack_on_load

SIZE = 4_500_000
CAPTIONS = IMAGES = 4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def decibels(maker, monkeypatch):
    """Returns how near what is loaded from the demo's dense file is to it."""
    monkeypatch.setenv(packed_cache.FOLDER, str(maker.folder / "packed"))
    monkeypatch.setattr(packed_cache, "keeps", lambda seconds: True)
    captions = [scene.caption() for scene in scenes.all_scenes()[1][:IMAGES]]
    painter, dense = Painter(captions, maker.folder), maker.dense_model()
    wanted = painter.latents(dense, IMAGES)

    def loaded() -> float:
        model = load_diffusion_model(str(maker.folder / "dense.safetensors"), pack_to=SIZE)
        model.set_model_compute_dtype(torch.float32)
        return snr(painter.latents(model, IMAGES), wanted)
    return loaded


def test_by_a_measurement(decibels, maker, measured, monkeypatch):
    without = decibels()
    measured("normal", CAPTIONS)
    path, damaged = (str(maker.folder / f"{name}.sensitivity") for name in ("made", "damaged"))
    Path(damaged).write_bytes(b"the newest, of which nothing can be read")
    monkeypatch.setattr(pack_on_load, "sensitivities_of", lambda model_path: [damaged, path])
    assert decibels() > without + 8
    os.utime(path, ns=(0, 0))  # a new measurement: nothing of the cache is of it
    monkeypatch.setattr(pack_on_load.Sensitivity, "moments", lambda self, name: None)
    assert decibels() < without + 8


@pytest.mark.parametrize("suffix", [".imatrix.dat", ".dat"])
def test_by_an_imatrix_with_the_models_name(suffix, decibels, maker, measured):
    without, found = decibels(), measured("fast", CAPTIONS)
    imatrix = maker.folder / f"dense{suffix}"
    write_imatrix(imatrix, {name: found.moments(name).importance for name in found.shapes})
    assert decibels() > without + 0.7
    imatrix.write_bytes(imatrix.read_bytes()[:4000])  # damaged: it is packed without
    assert decibels() == without
    imatrix.unlink()
