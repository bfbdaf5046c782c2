"""Every family of the host's diffusion models: packed files give the host's own model and the
host's own numbers."""
import dataclasses

import comfy.model_management
import comfy.utils
import gguf
import pytest
import torch
from families import (
    FAMILIES,
    comfyui_gguf_style,
    full_width_shapes,
    host_patcher,
    load_without_complaint,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
    stable_diffusion_cpp_style,
)

from devtools.files.gguf_files import write_gguf, write_zeros_gguf
from featherweight.loaders.files.open_weights import open_weights
from featherweight.ops.formats.base import FORMATS, GGML_FORMATS
from featherweight.ops.layers.packed_layers import PackedLayer
from featherweight.ops.tensor.packed_layout import is_packed

PREFIX = "model.diffusion_model."
# The types gguf's reference can dequantise.
PACKED = [
    packed.name for number, packed in GGML_FORMATS.items() if number in gguf.quants._type_traits
]
RUN = [name for name, family in FAMILIES.items() if family.latent]
# ACE-Step 1.5 computes while it is built, so that its shapes cannot be had without its full memory.
FULL_WIDTH = [name for name, family in FAMILIES.items()
              if (family.fixed or not family.latent) and name != "ace-step-1.5"]
# Beside the sampling tables, which the host counts as part of the model.
SLACK = 1 << 16


pytestmark = pytest.mark.usefixtures("small_models")


def load(path, family, caplog):
    """The loaded file, after a look at the host's class and complaints."""
    patcher = load_without_complaint(path, caplog)
    model_class = type(patcher.model)
    assert f"{model_class.__module__}.{model_class.__qualname__}" == family.host_class
    return patcher


def packed_layers(patcher):
    return {name for name, module in patcher.model.diffusion_model.named_modules()
            if isinstance(module, PackedLayer) and is_packed(module.weight)}


def check_packed(patcher, path):
    """What the file packs is packed in the model, bytes for bytes, except small tables. Nothing
    else takes more than float32."""
    layers = {
        name for name, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, PackedLayer) and not module.stays_plain(module.weight)
    }
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


def check_same_as_host(path, seen, family, caplog):
    """The file at `path` runs as the values in it do in the host, and stays packed."""
    patcher = load(path, family, caplog)
    check_packed(patcher, path)
    assert relative_error(run(patcher, family), run(host_patcher(seen, family), family)) < 1e-5
    check_packed(patcher, path)
    return patcher


def as_in_ggml(values):
    """The shape in which a C program keeps a tensor: four dimensions, without leading ones."""
    values = values.flatten(0, 1) if values.ndim == 5 else values
    while values.ndim > 1 and len(values) == 1:
        values = values[0]
    return values


# in the style of ComfyUI-GGUF all run in test_compute_dtype.py
@pytest.mark.parametrize(("name", "style"), [
    *((name, stable_diffusion_cpp_style) for name in RUN),
    *((name, comfyui_gguf_style) for name in RUN[::5]),
])
def test_packed_file_runs_as_in_the_host(name, style, tmp_path, monkeypatch, caplog):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = tmp_path / "model.gguf"
    weights = random_weights(family)
    stored = weights
    if style is stable_diffusion_cpp_style:
        stored = {PREFIX + key: as_in_ggml(values) for key, values in weights.items()}
    seen = write_gguf(path, stored, **style(), metadata=family.metadata)
    seen = {
        key.removeprefix(PREFIX): values.reshape(weights[key.removeprefix(PREFIX)].shape)
        for key, values in seen.items()
    }
    check_same_as_host(path, seen, family, caplog)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width_file_is_recognised_and_every_name_finds_its_place(name, tmp_path, caplog):
    path = tmp_path / "model.gguf"
    write_zeros_gguf(path, full_width_shapes(FAMILIES[name]), "Q4_0", "F32")
    check_packed(load(path, FAMILIES[name], caplog), path)


@pytest.mark.parametrize("diffusers_names", [False, True])
def test_full_size_sdxl_is_recognised_and_every_name_finds_its_place(
    diffusers_names, tmp_path, caplog
):
    base = FAMILIES["sdxl"]
    config = {
        **base.config, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10
    }
    family = dataclasses.replace(base, supported="SDXL", config=config)
    shapes = full_width_shapes(family)
    path = tmp_path / "model.gguf"
    names = {name: name for name in shapes}
    if diffusers_names:
        names = {
            host: name for name, host in comfy.utils.unet_to_diffusers(config).items()
            if host in shapes
        }
    write_zeros_gguf(path, {names[name]: shape for name, shape in shapes.items()}, "Q4_0", "F32")
    patcher = load(path, family, caplog)
    assert len(packed_layers(patcher)) == sum(
        len(shape) == 2 and shape[-1] % 32 == 0 for shape in shapes.values()
    )


@pytest.mark.parametrize("packed_type", PACKED)
def test_flux_in_every_format(packed_type, tmp_path, caplog):
    family = FAMILIES["flux-schnell"]
    path = tmp_path / "model.gguf"
    seen = write_gguf(path, random_weights(family), **stable_diffusion_cpp_style(packed_type))
    check_same_as_host(path, seen, family, caplog)
