"""Packed models in and out of torch's inference mode: the host runs workflows in it, and frees
memory on request outside."""
import contextlib
import itertools

import comfy.model_management
import pytest
import torch
from patched_models import flux_file, lora_for, packed_flux, packed_layers, patched, run

pytestmark = pytest.mark.usefixtures("small_models")

MODES = {"inside": torch.inference_mode, "outside": contextlib.nullcontext}


# a format of ours, and one of the host's beside NF4
@pytest.mark.parametrize(("format_name", "made", "used", "freed"), [
    *(("Q4_K", *modes) for modes in itertools.product(MODES, repeat=3)),
    ("float8_e4m3fn", "inside", "inside", "outside")])
def test_a_model_is_used_again_after_it_was_unloaded(format_name, made, used, freed):
    with MODES[made]():
        plain = packed_flux(format_name)
    with MODES[used]():
        patcher = patched(plain, (lora_for(flux_file(format_name)[1]), 1.0))
        without, expected = run(plain), run(patcher)
    with MODES[freed]():
        comfy.model_management.unload_all_models()
    count = len(packed_layers(plain))
    for mode in (used, made):
        with MODES[mode]():
            assert torch.equal(run(patcher), expected) and torch.equal(run(plain), without)
            assert len(packed_layers(plain)) == count
