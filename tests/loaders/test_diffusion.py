"""Every family of the host's diffusion models: packed files give the host's own model and the host's own numbers."""
import logging

import comfy.model_management
import comfy.sd
import gguf
import pytest
import torch
from families import FAMILIES, full_width_shapes, inputs, random_weights, shrunken_detection
from featherweight.devtools.gguf_files import write_gguf
from featherweight.loaders.container import open_weights
from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.ops.format import FORMATS, GGML_FORMATS
from featherweight.ops.linear import PackedLayer
from featherweight.ops.tensor import is_packed
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

PREFIX = "model.diffusion_model."
# The types gguf's reference can unpack.
PACKED = [packed.__name__ for number, packed in GGML_FORMATS.items() if number in gguf.quants._type_traits]
RUN = [pytest.param(name, marks=pytest.mark.heavy if family.heavy else ())
       for name, family in FAMILIES.items() if family.latent]
# Beside the sampling tables, which the host counts as part of the model.
SLACK = 1 << 16


@pytest.fixture(autouse=True)
def nothing_left_loaded():
    yield
    comfy.model_management.unload_all_models()


def comfyui_gguf_style(packed_type):
    """What ComfyUI-GGUF's converter packs: matrices. Norms and biases stay F32."""
    return lambda name, values: packed_type if values.ndim == 2 else "F32"


def stable_diffusion_cpp_style(packed_type, vectors="F16"):
    """What stable-diffusion.cpp packs: every matrix whose rows divide. The rest becomes F16."""
    return lambda name, values: packed_type if values.ndim == 2 else vectors if values.ndim == 1 else "F16"


def write_holey_gguf(path, shapes, packed_type):
    """A file of the full size that takes no room on disk: matrices whose rows divide in `packed_type`, the rest F32."""
    writer = gguf.GGUFWriter(str(path), "none")
    for name, shape in shapes.items():
        ggml_type = GGMLQuantizationType[packed_type]
        if len(shape) != 2 or shape[-1] % GGML_QUANT_SIZES[ggml_type][0]:
            ggml_type = GGMLQuantizationType.F32
        block_length, block_bytes = GGML_QUANT_SIZES[ggml_type]
        writer.add_tensor_info(name, shape, None, shape.numel() // block_length * block_bytes, ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = [-(-info.nbytes // 32) * 32 for info in writer.tensors[0].values()]
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.fout[0].truncate(start + sum(sizes))
    writer.close()


def load(path, family, caplog):
    """The loaded file, after a look at the host's class and complaints."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        patcher = load_diffusion_model(str(path))
    complaints = ("unet missing", "unet unexpected", "left over keys")
    assert not [record.getMessage() for record in caplog.records if record.getMessage().startswith(complaints)]
    model_class = type(patcher.model)
    assert f"{model_class.__module__}.{model_class.__qualname__}" == family.host_class
    return patcher


def packed_layers(patcher):
    return {name for name, module in patcher.model.diffusion_model.named_modules()
            if isinstance(module, PackedLayer) and is_packed(module.weight)}


def check_packed(patcher, path):
    """What the file packs is packed in the model, bytes for bytes, and nothing else takes more than float32."""
    layers = {name for name, module in patcher.model.diffusion_model.named_modules() if isinstance(module, PackedLayer)}
    expected, held = set(), 0
    for name, entry in open_weights(path).entries.items():
        layer = name.removeprefix(PREFIX).removesuffix(".weight")
        if entry.format in FORMATS and name.endswith(".weight") and layer in layers:
            expected.add(layer)
            held += entry.nbytes
        else:
            held += 4 * torch.Size(entry.shape).numel()
    assert packed_layers(patcher) == expected
    assert abs(patcher.model_size() - held) < SLACK


def host_patcher(seen, family):
    weights = {name: torch.tensor(values) for name, values in seen.items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, metadata=family.metadata)


def run(patcher, family):
    """What the model adds to its input. The denoised image alone would hide a small error behind the input."""
    comfy.model_management.load_models_gpu([patcher])
    arguments = inputs(family)
    with torch.inference_mode():
        return patcher.model.apply_model(**arguments) - arguments["x"]


def relative_error(out, expected):
    assert expected.isfinite().all() and expected.norm() > 0
    return ((out - expected).norm() / expected.norm()).item()


def check_same_as_host(path, seen, family, caplog):
    """The file at `path` runs as the values in it do in the host, and stays packed."""
    patcher = load(path, family, caplog)
    check_packed(patcher, path)
    assert relative_error(run(patcher, family), run(host_patcher(seen, family), family)) < 1e-5
    check_packed(patcher, path)
    return patcher


@pytest.mark.parametrize("name", RUN)
def test_file_of_comfyui_gguf_runs_as_in_the_host(name, tmp_path, monkeypatch, caplog):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    seen = write_gguf(path, random_weights(family), comfyui_gguf_style("Q8_0"), metadata=family.metadata)
    check_same_as_host(path, seen, family, caplog)


@pytest.mark.parametrize("name", RUN)
def test_file_of_stable_diffusion_cpp_runs_as_in_the_host(name, tmp_path, monkeypatch, caplog):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    weights = {PREFIX + name: values for name, values in random_weights(family).items()}
    seen = write_gguf(path, weights, stable_diffusion_cpp_style("Q4_0"), architecture=None, metadata=family.metadata)
    check_same_as_host(path, seen, family, caplog)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.fixed or not family.latent])
def test_full_width_file_is_recognised_and_every_name_finds_its_place(name, tmp_path, caplog):
    path = tmp_path / "model.gguf"
    write_holey_gguf(path, full_width_shapes(FAMILIES[name]), "Q4_0")
    check_packed(load(path, FAMILIES[name], caplog), path)


@pytest.mark.parametrize("packed_type", PACKED)
def test_flux_in_every_format(packed_type, tmp_path, caplog):
    family = FAMILIES["flux-schnell"]
    path = tmp_path / "model.gguf"
    style = stable_diffusion_cpp_style(packed_type, vectors="F32")
    seen = write_gguf(path, random_weights(family), style, architecture=None)
    check_same_as_host(path, seen, family, caplog)
