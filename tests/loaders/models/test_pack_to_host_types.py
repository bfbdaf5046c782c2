"""Packing to ComfyUI's own types while loading, from any file: encoded again, once."""
import re

import pytest
import torch
from patched_models import relative, run, tiny_flux
from recipe_process import digest
from safetensors.torch import save_file
from saving import save
from stored_files import FILES, diffusion_model, written

from devtools.files.gguf_files import write_gguf
from featherweight.loaders import progress
from featherweight.loaders.comfyui.who_computes import AS_COMFYUI
from featherweight.loaders.files import packed_cache
from featherweight.loaders.inspect.model_summary import memory_summary
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.packing.planning.file_plan import HOST_TYPES
from featherweight.loaders.packing.source import source_of_file
from featherweight.ops.quantize.row_types import ROW_TYPES, format_of, pack_to_type
from featherweight.ops.tensor.packed_layout import is_packed, packed_tensors

pytestmark = pytest.mark.usefixtures("small_models")
each_type = pytest.mark.parametrize("type_name", ROW_TYPES)
DIFFUSION_FILES = [name for name, (load, *_) in FILES.items() if load is diffusion_model]
# Most of the difference to the dense model's output that a type may make on a small random one.
ERRORS = {"int8_convrot": 0.03, "float8_e4m3fn": 0.1, "mxfp8": 0.1, "nvfp4": 0.3,
          "asym_w4a8_int8": 0.3}


def weights_of(patcher) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in patcher.model.diffusion_model.named_parameters()}


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "flux-Q4_K.gguf"
    write_gguf(path, tiny_flux(), lambda name, values: "Q4_K" if "_blocks." in name
               and values.ndim == 2 and values.shape[1] % 256 == 0 else "F16")
    return path


@pytest.mark.parametrize(("family", "type_name"), [
    pytest.param(family, type_name, marks=() if type_name == "int8_convrot" or family == "Q4_K"
                 else pytest.mark.heavy)
    for family in DIFFUSION_FILES for type_name in ROW_TYPES])
def test_weights_of_every_file_are_those_that_packing_its_values_gives(type_name, family, tmp_path):
    _, file = written(family, tmp_path)
    source = source_of_file(file.path)
    found, again = weights_of(load_diffusion_model(str(file.path), pack_to=type_name)), 0
    for name, weight in source.weights.items():
        packed = found[name]
        if not is_packed(packed) or packed.params.format != _format(type_name, packed):
            continue
        again += 1
        if weight.stored_type == type_name:
            continue  # stays as it is in the file
        expected = pack_to_type(weight.read(0, weight.shape[0]), ROW_TYPES[type_name])
        for tensor, wanted in zip(packed_tensors(packed), packed_tensors(expected), strict=True):
            # of rotated values the reader of a file may round a sum in another order
            assert (tensor != wanted).float().mean() < 1e-3, name
    assert again


def _format(type_name, packed):
    shape = tuple(packed.shape)
    return format_of(type_name, shape) if ROW_TYPES[type_name].takes(shape) else None


@each_type
def test_the_model_is_close_to_the_one_it_comes_from(type_name, tmp_path):
    save_file(tiny_flux(), tmp_path / "flux.safetensors")
    plain = load_diffusion_model(str(tmp_path / "flux.safetensors"))
    packed = load_diffusion_model(str(tmp_path / "flux.safetensors"), pack_to=type_name)
    assert relative(run(packed), run(plain)) < ERRORS[type_name]


@pytest.mark.parametrize("type_name", HOST_TYPES)
def test_comfyui_computes_it_as_the_file_that_is_saved_of_it(type_name, gguf):
    """Where its kernels run: here because it is asked to."""
    save(source_of_file(gguf), gguf.with_name("saved.safetensors"), type_name)
    saved = load_diffusion_model(str(gguf.with_name("saved.safetensors")), host_formats=AS_COMFYUI)
    loaded = load_diffusion_model(str(gguf), pack_to=type_name, host_formats=AS_COMFYUI)
    layer = loaded.model.diffusion_model.double_blocks[0].img_mlp[0]
    assert "MixedPrecisionOps" in str(type(layer).__mro__) and not is_packed(layer.weight)
    assert relative(run(loaded), run(saved)) < 1e-5


@each_type
def test_the_node_says_before_what_becomes_of_the_file_and_after_what_it_lost(type_name, gguf,
                                                                             monkeypatch):
    texts = []
    monkeypatch.setattr(progress, "_text_sender", lambda: texts.append)
    model = load_diffusion_model(str(gguf), pack_to=type_name)
    before = [text for text in texts if "becomes" in text]
    assert re.match(rf"Q4_K, [\d.]+ [kM]B, becomes {type_name}, [\d.]+ [kM]B\npacking", before[0])
    assert re.search(r"packed from Q4_K in \d+ s, \d\d dB above what was lost",
                     memory_summary(model))


@each_type
def test_the_second_load_packs_nothing(type_name, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "kept"))
    first, second = (load_diffusion_model(str(gguf), pack_to=type_name) for _ in range(2))
    assert "kept for the next time" in memory_summary(first)
    assert memory_summary(second).endswith("packed from Q4_K in an earlier load")
    assert digest(first) == digest(second)
