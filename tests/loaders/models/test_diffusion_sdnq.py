"""Whole models from folders of SDNQ, next to the host's dense models of the same values."""
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import (
    FAMILIES,
    host_patcher,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
)
from patched_models import LIMIT, error_by_effect, lora_for, patched
from sdnq_writer import H4, write_folder

from featherweight.loaders.comfyui.model_summary import memory_summary
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")

ROTATED = {"settings": {"use_hadamard": True, "hadamard_group_size": 64}, "rotated": (64, H4)}
LAYOUTS = {
    "uint4 svd": {"name": "uint4", "rank": 16, "group": 64},
    "int8": {"name": "int8"},
    "int8 transposed": {"name": "int8", "transposed": True, "rank": 4,
                        "settings": {"use_quantized_matmul": True}},
    "uint4 rotated": {"name": "uint4", "group": 64, **ROTATED},
    "int5 svd rotated": {"name": "int5", "rank": 8, **ROTATED},
    "uint4 half": {"name": "uint4", "group": 64, "scale_dtype": torch.bfloat16},
}


def is_chosen(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and all(size % 64 == 0 for size in tensor.shape)


def write_model(name: str, layout: str, folder):
    """A model as a folder of diffusers; gives its values in the host's names."""
    family, weights = FAMILIES[name], random_weights(FAMILIES[name])
    options = {"is_chosen": is_chosen, **LAYOUTS[layout]}
    if name not in DIFFUSERS:  # the host's names are diffusers'
        return write_folder(folder, weights, **options)
    table = DIFFUSERS[name](family.config)
    values = write_folder(folder, in_diffusers_names(weights, table), **options)
    return in_the_hosts_names(values, weights, table)


@pytest.mark.parametrize(("name", "layout"), [
    *(("flux-dev", layout) for layout in LAYOUTS), ("qwen-image", "uint4 svd"),
    ("z-image", "int8 transposed")
])
def test_a_model_computes_what_its_dense_values_compute(name, layout, tmp_path, monkeypatch):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    values = write_model(name, layout, tmp_path / "transformer")
    ours = load_diffusion_model(str(tmp_path / "transformer"))
    parameters = list(ours.model.diffusion_model.parameters())
    assert type(ours.model).__name__ == family.host_class.rpartition(".")[2]
    assert sum(map(is_packed, parameters)) >= 10
    assert f"SDNQ {LAYOUTS[layout]['name']}" in memory_summary(ours)
    held = sum(parameter.nbytes for parameter in parameters)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    assert held <= 1.05 * stored
    assert relative_error(run(ours, family), run(host_patcher(values, family), family)) < 1e-5


@pytest.mark.parametrize("layout", ["uint4 svd", "uint4 rotated"])
def test_a_unet_computes_with_packed_convolutions(layout, tmp_path):
    family, options = FAMILIES["sd1.5"], {**LAYOUTS[layout]}
    if "rotated" in options:  # groups are of channels, all of which 32 divides
        options |= {"settings": {"use_hadamard": True, "hadamard_group_size": 16},
                    "rotated": (16, H4)}
    options.pop("group", None)
    values = write_folder(
        tmp_path, random_weights(family), is_chosen=lambda name, tensor: tensor.ndim in (2, 4)
        and tensor.shape[1] % 32 == 0, **options)
    ours = load_diffusion_model(str(tmp_path))
    assert sum(is_packed(parameter) and parameter.ndim == 4
               for parameter in ours.model.diffusion_model.parameters()) >= 5
    assert relative_error(run(ours, family), run(host_patcher(values, family), family)) < 1e-5


@pytest.fixture(params=["uint4 svd", "uint4 rotated", "int5 svd rotated"])
def flux(request, tmp_path):
    """A Flux of SDNQ, the host's dense model of its values, and these."""
    values = write_model("flux-dev", request.param, tmp_path)
    return load_diffusion_model(str(tmp_path)), host_patcher(values, FAMILIES["flux-dev"]), values


def test_loras_are_as_exact_as_on_the_dense_model(flux):
    ours, dense, values = flux
    family = FAMILIES["flux-dev"]
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(values, seed=2), -0.4),
             (lora_for(values, "dora", seed=3), 0.5)]
    without = run(dense, family)
    for strength in (0.8, 0.3):
        loras[0] = (loras[0][0], strength)
        expected = run(patched(dense, *loras), family)
        assert error_by_effect(run(patched(ours, *loras), family), expected, without) < LIMIT
    assert relative_error(run(ours, family), without) < 1e-5
