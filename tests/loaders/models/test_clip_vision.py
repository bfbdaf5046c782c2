"""CLIP vision models with packed weights see what the host's dense ones of the same values do."""
import os

import comfy.clip_vision
import pytest
import torch
from families import FAMILIES, random_weights, relative_error
from packed_files import (
    PACKED_FILES,
    load_values_of,
    write_for_a_loader,
    write_q8_0,
    write_with_dense,
)
from safetensors.torch import save_file
from vision_models import VISION_MODELS, encoded, packed_layers, shrink

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.inspect.model_summary import memory_summary
from featherweight.loaders.models.clip_vision import load_clip_vision
from featherweight.loaders.models.diffusion import load_diffusion_model
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
    return whole_blocks - set(packed_layers(packed))


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
    assert packed_layers(load_clip_vision(str(tmp_path / name)))
    assert_alike(tmp_path / name, dense)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_model_that_is_packed_as_it_is_read_sees_what_its_dense_self_does(name, tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file({key: value.float().contiguous() for key, value in VISION_MODELS[name]().items()},
              path)
    packed, dense = load_clip_vision(str(path), "Q8_0"), comfy.clip_vision.load(str(path))
    load_values_of(dense.model, packed.model)
    assert packed_layers(packed) and "packed from F32" in memory_summary(packed.patcher)
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


def test_use_that_follows_a_change_of_the_file_is_refused(tmp_path):
    path = tmp_path / "net.gguf"
    write_q8_0(path, VISION_MODELS["CLIP L"]())
    clip_vision = load_clip_vision(str(path))
    encoded(clip_vision)
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    os.utime(path, ns=(0, 0))
    with pytest.raises(WeightFileError, match="net.gguf was written to after it was loaded"):
        encoded(clip_vision)


def without_the_right_width():
    return VISION_MODELS["CLIP L"]() | {"vision_model.pre_layrnorm.weight": torch.ones(64)}


WRONG = {
    "diffusion model": (lambda: random_weights(FAMILIES["flux-dev"]),
                        "is a diffusion model, expected a CLIP vision model. Pick a CLIP vision"
                        " model here."),
    "mmproj": (lambda: {"v.blk.0.attn_q.weight": torch.ones(32, 32)},
               r"is the vision part \(mmproj\) of a text encoder \(it has 'v.blk.0.attn_q.weight'"
               r"\), expected a CLIP vision model."),
    "text encoder": (lambda: {"text_model.embeddings.token_embedding.weight": torch.ones(9, 32)},
                     r"is a text encoder \(it has '.*'\), expected a CLIP vision model."),
    "nothing known": (lambda: {"a.weight": torch.ones(4, 32)},
                      r"holds no CLIP vision model that this ComfyUI knows \(1 tensors, first"
                      r" 'a.weight'\). Pick another file, or update ComfyUI if the CLIP vision"
                      " model is new."),
    "part": (lambda: {"vision_model.encoder.layers.22.layer_norm1.weight": torch.ones(32)},
             "holds no CLIP vision model that this ComfyUI knows"),
    "other sizes": (without_the_right_width, ".*sizes are not"),
}


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_file_is_refused_in_a_sentence(wrong, suffix, tmp_path):
    weights, message = WRONG[wrong]
    path = tmp_path / f"net.{suffix}"
    write_for_a_loader(path, weights())
    with pytest.raises(WeightFileError, match=f"^net.{suffix}:? {message}") as error:
        load_clip_vision(str(path))
    assert "\n" not in str(error.value)


def test_diffusion_model_loader_says_that_it_is_a_vision_model(tmp_path):
    write_q8_0(tmp_path / "net.gguf", VISION_MODELS["CLIP H"]())
    with pytest.raises(WeightFileError, match="net.gguf is a CLIP vision model .*, expected a"
                                              " diffusion model. Pick it in Load CLIP Vision"):
        load_diffusion_model(str(tmp_path / "net.gguf"))
