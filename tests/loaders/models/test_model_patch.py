"""Model patches with packed weights change a picture as the host's dense ones of the same values
do."""
import os

import comfy.ops
import pytest
import torch
from comfy_extras import nodes_model_patch
from controlnets import WRITERS, packed_layers
from families import FAMILIES, relative_error, shrunken_detection
from host_nodes import MODELS
from model_patches import KINDS, load_dense, qwen, sample, shrink
from packed_files import (
    PACKED_FILES,
    load_values_of,
    write_q8_0,
    write_with_dense,
)
from safetensors.torch import save_file

from featherweight.loaders.models.model_patch import load_model_patch
from featherweight.ops.patcher import PackedPatcher
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models", "small_patches")


@pytest.fixture
def small_patches(monkeypatch):
    shrink(monkeypatch)


@pytest.mark.parametrize("format_name", WRITERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_packed_model_patch_acts_as_its_dense_self_does(kind, format_name, tmp_path, monkeypatch):
    if kind.base:
        shrunken_detection(MODELS[kind.base], monkeypatch)
    writer, name = WRITERS[format_name]
    dense = write_with_dense(writer, tmp_path / name, kind.weights())
    packed, of_the_host = load_model_patch(str(tmp_path / name)), load_dense(dense, monkeypatch)
    expected = sample(kind, of_the_host)
    assert expected.shape != sample(kind).shape or relative_error(sample(kind), expected) > 1e-3
    assert relative_error(sample(kind, packed), expected) < 1e-5
    assert isinstance(packed, PackedPatcher)
    assert packed.model_size() <= 1.05 * os.path.getsize(tmp_path / name)
    whole_blocks = {name.removesuffix(".weight")
                    for name, value in of_the_host.model.state_dict().items()
                    if value.ndim == 2 and value.shape[1] % 32 == 0}
    assert whole_blocks <= set(packed_layers(packed.model))


OTHER_FORMATS = sorted(PACKED_FILES.keys() - WRITERS.keys())


@pytest.mark.parametrize("format_name", OTHER_FORMATS)
def test_model_patch_of_any_packed_format_acts_as_its_dense_self(format_name, tmp_path,
                                                                 monkeypatch):
    kind = KINDS["Z-Image Fun"]
    shrunken_detection(FAMILIES["z-image"], monkeypatch)
    writer, name = PACKED_FILES[format_name]
    dense = write_with_dense(writer, tmp_path / name, kind.weights())
    packed = load_model_patch(str(tmp_path / name))
    assert len([name for name in packed_layers(packed.model) if name.endswith(".qkv")]) == 8
    assert relative_error(sample(kind, packed), sample(kind, load_dense(dense, monkeypatch))) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_model_patch_that_is_packed_as_it_is_read_acts_as_its_dense_self(name, tmp_path,
                                                                         monkeypatch):
    kind, path = KINDS[name], tmp_path / "dense.safetensors"
    if kind.base:
        shrunken_detection(MODELS[kind.base], monkeypatch)
    save_file({key: value.float().contiguous() for key, value in kind.weights().items()}, path)
    packed, dense = load_model_patch(str(path), "Q8_0"), load_dense(str(path), monkeypatch)
    load_values_of(dense.model, packed.model)
    # those have no blocks by which a plan knows their layers, and stay in 16 bits
    assert bool(packed_layers(packed.model)) == (name not in ("USO", "LLLite"))
    assert relative_error(sample(kind, packed), sample(kind, dense)) < 1e-5


def test_file_without_packed_weights_loads_as_in_the_hosts_node(tmp_path, monkeypatch):
    save_file(dict(qwen()), tmp_path / "dense.safetensors")
    path = str(tmp_path / "dense.safetensors")
    loaded, of_the_host = load_model_patch(path), load_dense(path, monkeypatch)
    assert type(loaded) is type(of_the_host) and type(loaded.model) is type(of_the_host.model)
    kind = KINDS["Qwen DiffSynth"]
    shrunken_detection(FAMILIES["qwen-image"], monkeypatch)
    assert torch.equal(sample(kind, loaded), sample(kind, of_the_host))


def test_a_load_leaves_the_hosts_module_as_it_is(tmp_path):
    before = dict(vars(nodes_model_patch))
    operations = comfy.ops.manual_cast
    write_q8_0(tmp_path / "net.gguf", qwen())
    assert packed_layers(load_model_patch(str(tmp_path / "net.gguf")).model)
    assert vars(nodes_model_patch) == before and comfy.ops.manual_cast is operations
    assert nodes_model_patch.comfy.ops.manual_cast is operations


def test_encoder_in_a_supir_file_is_dequantised(tmp_path):
    seen = write_q8_0(tmp_path / "net.gguf", KINDS["SUPIR"].weights())
    encoder = load_model_patch(str(tmp_path / "net.gguf")).model.denoise_encoder_sd
    name, value = next(iter(encoder.items()))
    assert not is_packed(value)
    assert torch.equal(value, seen[f"first_stage_model.denoise_encoder.{name}"])
