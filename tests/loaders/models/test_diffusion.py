"""Diffusion models in every form of file, and every family of the host's at its own width."""
import dataclasses

import comfy.model_management
import comfy.utils
import pytest
import torch
from diffusion_tester import FORMS, SOME_FORMS, DiffusionTester, check_as_in_gguf
from families import (
    FAMILIES,
    full_width_shapes,
    inputs,
    load_without_complaint,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
)
from hooked import run_hooked
from model_tester import quantized_layers
from pack_api import is_packed, load_diffusion_model, product
from packed_files import write_ggml
from patched_models import lora_for, patched

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


def test_a_model_that_keeps_a_prompts_keys_makes_them_again_for_other_patches(
        tmp_path, monkeypatch):
    """HiDream-O1 computes the tokens of a prompt once."""
    family = FAMILIES["hidream-o1"]
    shrunken_detection(family, monkeypatch)
    write_ggml("Q8_0", tmp_path / "model.gguf", random_weights(family))
    packed = load_diffusion_model(str(tmp_path / "model.gguf"))
    lora = lora_for({name: product.dequantize(weight, torch.float32) for name, weight
                     in packed.model.diffusion_model.named_parameters() if is_packed(weight)})

    def step(patcher):
        """As `run`, which has the model forget."""
        comfy.model_management.load_models_gpu([patcher])
        arguments = inputs(family)
        with torch.inference_mode():
            return patcher.model.apply_model(**arguments)

    expected = [step(packed), run(patched(packed, (lora, 1.0)), family) + inputs(family)["x"]]
    for index, patcher in enumerate([packed, patched(packed, (lora, 1.0)), packed]):
        assert relative_error(step(patcher), expected[index % 2]) < 1e-6
    before, hooked, after = run_hooked(packed, family, lora, 1.0)
    assert relative_error(after, before) < 1e-6 < relative_error(hooked, before)
