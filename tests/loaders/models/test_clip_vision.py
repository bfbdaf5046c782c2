"""CLIP vision models with packed weights see what the host's dense ones of the same values do."""
import copy

import comfy.clip_vision
import pytest
import torch
from families import relative_error
from model_tester import ModelTester
from pack_api import WeightFileError, load_text_encoder
from packed_files import PACKED_FILES
from safetensors.torch import save_file
from vision_models import VISION_MODELS, encoded, shrink

from featherweight.loaders.inspect import inspect
from featherweight.loaders.models.clip_vision import load_clip_vision

pytestmark = pytest.mark.usefixtures("small_models")


class TestCLIPVision(ModelTester):
    kinds = VISION_MODELS
    main = "SigLIP 2"
    without_packed = {
        **dict.fromkeys(("CLIP L", "CLIP L 336", "CLIP H", "CLIP bigG", "SigLIP", "DINOv3"),
                        ("Q4_K",)),
        "CLIP H of open_clip": PACKED_FILES.keys() - {"Q8_0"}}
    not_the_hosts = ("CLIP H of open_clip",)
    test_a_deep_clone_has_packed_weights_of_its_own = None  # the host makes none

    def shrink(self, kind, monkeypatch):
        shrink(monkeypatch)

    def weights(self, kind):
        return kind()

    def load(self, path, pack_to=None):
        return load_clip_vision(path, pack_to)

    def load_dense(self, path):
        return comfy.clip_vision.load(path)

    def run(self, kind, loaded):
        values = encoded(loaded)
        assert len(values) >= 2
        return torch.cat([value.flatten() for _, value in sorted(values.items())])

    def patcher(self, loaded):
        return loaded.patcher

    def with_patcher(self, loaded, patcher):
        loaded = copy.copy(loaded)
        loaded.patcher, loaded.model = patcher, patcher.model
        return loaded

    def stays_dense(self, packed, dense):
        """open_clip's projection is transposed."""
        return super().stays_dense(packed, dense) | {"visual_projection"}


@pytest.fixture
def small_vision(monkeypatch):
    shrink(monkeypatch)


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


@pytest.mark.usefixtures("small_vision")
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
