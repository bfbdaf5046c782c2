"""Every family of the host's diffusion models: packed files give the host's own model and the host's own numbers."""
import logging

import comfy.model_management
import comfy.sd
import gguf
import pytest
import torch
from families import FAMILIES, inputs, random_weights, shrunken_detection
from featherweight.devtools.gguf_files import write_gguf
from featherweight.loaders.container import open_weights
from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.ops.format import GGML_FORMATS
from featherweight.ops.tensor import is_packed

# The types gguf's reference can unpack.
PACKED = [packed.__name__ for number, packed in GGML_FORMATS.items() if number in gguf.quants._type_traits]
PREFIX = "model.diffusion_model."


@pytest.fixture(autouse=True)
def nothing_left_loaded():
    yield
    comfy.model_management.unload_all_models()


def comfyui_gguf_style(packed_type):
    """What ComfyUI-GGUF's converter packs: matrices. Norms and biases stay F32."""
    return lambda name, values: packed_type if values.ndim == 2 else "F32"


def stable_diffusion_cpp_style(packed_type, vectors="F16"):
    """What stable-diffusion.cpp packs: every matrix whose rows divide. Norms and biases become F16."""
    return lambda name, values: packed_type if values.ndim == 2 else vectors if values.ndim == 1 else "F16"


def host_patcher(seen):
    return comfy.sd.load_diffusion_model_state_dict({name: torch.tensor(values) for name, values in seen.items()})


def run(patcher, family):
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model.apply_model(**inputs(family))


def relative_error(out, expected):
    assert expected.isfinite().all() and expected.norm() > 0
    return ((out - expected).norm() / expected.norm()).item()


def packed_layers(patcher):
    return {name for name, module in patcher.model.diffusion_model.named_modules()
            if isinstance(module, torch.nn.Linear) and is_packed(module.weight)}


def check_same_as_host(path, seen, family, caplog):
    """The file at `path` behaves as the host's own loader does with the values in it."""
    with caplog.at_level(logging.WARNING):
        patcher = load_diffusion_model(str(path))
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    model_class = type(patcher.model)
    assert f"{model_class.__module__}.{model_class.__qualname__}" == family.host_class
    file = open_weights(path)
    in_file = {name.removeprefix(PREFIX).removesuffix(".weight") for name, entry in file.entries.items()
               if entry.format not in ("F32", "F16") and len(entry.shape) == 2}
    layers = {name for name, module in patcher.model.diffusion_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packed_layers(patcher) == in_file & layers
    expected = run(host_patcher(seen), family)
    assert relative_error(run(patcher, family), expected) < 1e-5
    assert packed_layers(patcher) == in_file & layers
    return patcher


@pytest.mark.parametrize("name", FAMILIES)
def test_file_of_comfyui_gguf_runs_as_in_the_host(name, tmp_path, monkeypatch, caplog):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    seen = write_gguf(path, random_weights(family), comfyui_gguf_style("Q8_0"), architecture="flux")
    check_same_as_host(path, seen, family, caplog)


@pytest.mark.parametrize("name", FAMILIES)
def test_file_of_stable_diffusion_cpp_runs_as_in_the_host(name, tmp_path, monkeypatch, caplog):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    weights = {PREFIX + name: values for name, values in random_weights(family).items()}
    seen = write_gguf(path, weights, stable_diffusion_cpp_style("Q4_0"), architecture=None)
    check_same_as_host(path, seen, family, caplog)


@pytest.mark.parametrize("packed_type", PACKED)
def test_flux_in_every_format(packed_type, tmp_path, caplog):
    family = FAMILIES["flux-schnell"]
    path = tmp_path / "model.gguf"
    seen = write_gguf(path, random_weights(family), stable_diffusion_cpp_style(packed_type, vectors="F32"), architecture=None)
    check_same_as_host(path, seen, family, caplog)
