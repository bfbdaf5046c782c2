"""Model patches with packed weights change a picture as the host's dense ones of the same values
do."""

import comfy.ops
import pytest
import torch
from comfy_extras import nodes_model_patch
from families import shrunken_detection
from host_nodes import MODELS
from model_patches import KINDS, load_dense, qwen, sample, shrink
from model_tester import ModelTester, quantized_layers
from pack_api import is_packed
from packed_files import (
    write_q8_0,
)

from featherweight.loaders.models.model_patch import load_model_patch

pytestmark = pytest.mark.usefixtures("small_models")


class TestModelPatches(ModelTester):
    kinds = KINDS
    main = "Z-Image Fun"
    not_the_hosts = tuple(name for name in KINDS if name.startswith("Z-Image"))
    plain = ("USO", "LLLite")  # without blocks by which a plan knows their layers
    test_a_deep_clone_has_packed_weights_of_its_own = None  # the host makes none

    @pytest.fixture(autouse=True)
    def for_folders(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def shrink(self, kind, monkeypatch):
        shrink(monkeypatch)
        if kind.base:
            shrunken_detection(MODELS[kind.base], monkeypatch)

    def load(self, path, pack_to=None):
        return load_model_patch(path, pack_to)

    def load_dense(self, path):
        return load_dense(path, self.monkeypatch)

    def run(self, kind, loaded):
        return sample(kind, loaded)

    def without(self, kind):
        return sample(kind)


@pytest.fixture
def small_patches(monkeypatch):
    shrink(monkeypatch)


@pytest.mark.usefixtures("small_patches")
def test_a_load_leaves_the_hosts_module_as_it_is(tmp_path):
    before = dict(vars(nodes_model_patch))
    operations = comfy.ops.manual_cast
    write_q8_0(tmp_path / "net.gguf", qwen())
    assert quantized_layers(load_model_patch(str(tmp_path / "net.gguf")).model)
    assert vars(nodes_model_patch) == before and comfy.ops.manual_cast is operations
    assert nodes_model_patch.comfy.ops.manual_cast is operations


@pytest.mark.usefixtures("small_patches")
def test_encoder_in_a_supir_file_is_dequantised(tmp_path):
    seen = write_q8_0(tmp_path / "net.gguf", KINDS["SUPIR"].weights())
    encoder = load_model_patch(str(tmp_path / "net.gguf")).model.denoise_encoder_sd
    name, value = next(iter(encoder.items()))
    assert not is_packed(value)
    assert torch.equal(value, seen[f"first_stage_model.denoise_encoder.{name}"])
