"""Diffusion models in every form of file, and every family of the host's at its own width."""
import dataclasses

import comfy.utils
import pytest
from diffusion_tester import FORMS, SOME_FORMS, DiffusionTester, check_as_in_gguf
from families import FAMILIES, full_width_shapes, load_without_complaint
from model_tester import quantized_layers

from devtools.files.gguf_files import write_zeros_gguf

# ACE-Step 1.5 computes while it is built, so that its shapes cannot be had without its full memory.
FULL_WIDTH = [name for name, family in FAMILIES.items()
              if (family.fixed or not family.latent) and name != "ace-step-1.5"]

pytestmark = pytest.mark.usefixtures("small_models")


class TestForms(DiffusionTester):
    formats = FORMS
    some_formats = SOME_FORMS
    # those of each model are in test_model_table.py
    test_a_model_that_is_packed_as_it_is_read_computes_what_its_dense_self_computes = None
    test_a_file_without_packed_weights_loads_as_the_host_loads_it = None


def load(path, family, caplog):
    """The loaded file, after a look at the host's class and complaints."""
    patcher = load_without_complaint(path, caplog)
    model_class = type(patcher.model)
    assert f"{model_class.__module__}.{model_class.__qualname__}" == family.host_class
    return patcher


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width_file_is_recognized_and_every_name_finds_its_place(name, tmp_path, caplog):
    path = tmp_path / "model.gguf"
    write_zeros_gguf(path, full_width_shapes(FAMILIES[name]), "Q4_0", "F32")
    check_as_in_gguf(load(path, FAMILIES[name], caplog), str(path))


@pytest.mark.parametrize("diffusers_names", [False, True])
def test_full_size_sdxl_is_recognized_and_every_name_finds_its_place(
        diffusers_names, tmp_path, caplog):
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
    assert len(quantized_layers(patcher.model.diffusion_model)) == sum(
        len(shape) == 2 and shape[-1] % 32 == 0 for shape in shapes.values())
