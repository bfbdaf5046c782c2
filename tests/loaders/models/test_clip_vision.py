"""CLIP vision models with packed weights see what the host's dense ones of the same values do."""
import os

import comfy.clip_vision
import pytest
import torch
from controlnets import packed_layers
from families import relative_error
from packed_files import (
    PACKED_FILES,
    load_values_of,
    write_q8_0,
    write_with_dense,
)
from safetensors.torch import save_file
from vision_models import VISION_MODELS, encoded, shrink

from featherweight.loaders.comfyui.model_summary import memory_summary
from featherweight.loaders.models.clip_vision import load_clip_vision
from featherweight.ops.patcher import PackedPatcher

pytestmark = pytest.mark.usefixtures("small_models", "small_vision")


@pytest.fixture
def small_vision(monkeypatch):
    shrink(monkeypatch)


def assert_alike(path, dense):
    packed, of_the_host = load_clip_vision(str(path)), comfy.clip_vision.load(str(dense))
    assert isinstance(packed, comfy.clip_vision.ClipVisionModel)
    expected = encoded(of_the_host)
    assert len(expected) >= 2
    for name, value in encoded(packed).items():
        assert relative_error(value, expected[name]) < 1e-5, name
    assert isinstance(packed.patcher, PackedPatcher)
    files = path.iterdir() if path.is_dir() else [path]
    assert packed.patcher.model_size() <= 1.05 * sum(map(os.path.getsize, files))
    whole_blocks = {name.removesuffix(".weight")
                    for name, value in of_the_host.get_sd().items()
                    if name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 32 == 0}
    return whole_blocks - set(packed_layers(packed.model))


@pytest.mark.parametrize("name", VISION_MODELS)
def test_packed_vision_model_sees_what_its_dense_self_does(name, tmp_path):
    dense = write_with_dense(write_q8_0, tmp_path / "net.gguf", VISION_MODELS[name]())
    unpacked = assert_alike(tmp_path / "net.gguf", dense)
    # open_clip's is transposed
    assert unpacked == ({"visual_projection"} if name == "CLIP H of open_clip" else set())


OTHER_FORMATS = sorted(PACKED_FILES.keys() - {"Q8_0"})


@pytest.mark.parametrize("format_name", OTHER_FORMATS)
def test_vision_model_of_any_packed_format_sees_what_its_dense_self_does(format_name, tmp_path):
    writer, name = PACKED_FILES[format_name]
    weights = VISION_MODELS["SigLIP 2" if format_name == "Q4_K" else "CLIP H"]()
    dense = write_with_dense(writer, tmp_path / name, weights)
    assert packed_layers(load_clip_vision(str(tmp_path / name)).model)
    assert_alike(tmp_path / name, dense)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_model_that_is_packed_as_it_is_read_sees_what_its_dense_self_does(name, tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file({key: value.float().contiguous() for key, value in VISION_MODELS[name]().items()},
              path)
    packed, dense = load_clip_vision(str(path), "Q8_0"), comfy.clip_vision.load(str(path))
    load_values_of(dense.model, packed.model)
    assert packed_layers(packed.model) and "packed from F32" in memory_summary(packed.patcher)
    expected = encoded(dense)
    for key, value in encoded(packed).items():
        assert relative_error(value, expected[key]) < 1e-5, key


def test_file_without_packed_weights_loads_as_the_host_loads_it(tmp_path):
    save_file(dict(VISION_MODELS["CLIP L"]()), tmp_path / "dense.safetensors")
    loaded = load_clip_vision(str(tmp_path / "dense.safetensors"))
    of_the_host = comfy.clip_vision.load(str(tmp_path / "dense.safetensors"))
    assert type(loaded.patcher) is type(of_the_host.patcher)
    expected = encoded(of_the_host)
    assert all(torch.equal(value, expected[name]) for name, value in encoded(loaded).items())
