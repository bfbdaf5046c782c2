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
from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.inspect import inspect
from featherweight.loaders.models.clip_vision import load_clip_vision
from featherweight.loaders.models.text_encoder import load_text_encoder
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


def in_names_of_wan(weights):
    """CLIP H of open_clip under the names of Wan-Video/Wan2.1, wan/modules/clip.py, with a text
    part."""
    names = {"visual.class_embedding": "visual.cls_embedding",
             "visual.conv1": "visual.patch_embedding",
             "visual.positional_embedding": "visual.pos_embedding", "ln_pre": "pre_norm",
             "ln_post": "post_norm", "visual.proj": "visual.head", ".resblocks": "",
             "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_": "attn.to_qkv.",
             "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    renamed = {"log_scale": torch.tensor(1.0), "textual.token_embedding.weight": torch.ones(8, 4)}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value.view(1, -1, value.shape[-1]) if "_embedding" in name and (
            value.ndim < 3) else value
    return renamed


@pytest.mark.parametrize("pack_to", [None, "Q8_0"])
def test_a_clip_under_wans_names_sees_what_it_does_under_those_of_open_clip(pack_to, tmp_path):
    weights = VISION_MODELS["CLIP H of open_clip"]()
    for name, tensors in (("a", weights), ("wan", in_names_of_wan(weights))):
        save_file({key: value.contiguous() for key, value in tensors.items()},
                  tmp_path / f"{name}.safetensors")
    path = str(tmp_path / "wan.safetensors")
    assert inspect(path)[0].title == (
        "wan.safetensors is a CLIP vision model: CLIP H, under Wan's names.")
    expected = encoded(load_clip_vision(str(tmp_path / "a.safetensors"), pack_to))
    for name, value in encoded(load_clip_vision(path, pack_to)).items():
        assert relative_error(value, expected[name]) < 1e-6, name
    with pytest.raises(WeightFileError, match=(
            "^wan.safetensors is a CLIP vision model .*, expected a text encoder. Pick a text")):
        load_text_encoder([path], "wan", pack_to=pack_to)
