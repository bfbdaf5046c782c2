"""Diffusion models that bitsandbytes packed: read without it, and with LoRAs of every kind."""
import os
import subprocess
import sys

import comfyui_and_pack

import pytest
import torch
from pack_api import load_diffusion_model
from patched_models import KINDS as LORA_KINDS
from patched_models import (
    LIMIT,
    dense_of,
    error_by_effect,
    lora_for,
    packed_layers,
    patched,
    relative,
    run,
    tiny_flux,
)

pytest.importorskip("bitsandbytes", reason="it writes the files")
from devtools.files.bnb_files import write_bnb, write_bnb_int8

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None  # an import of it fails
sys.path[:0] = {folders!r}
import comfyui_and_pack
import torch
from pack_api import load_diffusion_model
from patched_models import run
for path in {paths!r}:
    torch.save(run(load_diffusion_model(path)), path + ".pt")
"""


def test_bitsandbytes_is_not_needed(tmp_path):
    writers = {"nf4.safetensors": write_bnb, "int8.safetensors": write_bnb_int8}
    seen = {str(tmp_path / name): write(tmp_path / name, tiny_flux())
            for name, write in writers.items()}
    folders = [os.path.dirname(comfyui_and_pack.__file__)]
    script = WITHOUT_BITSANDBYTES.format(paths=list(seen), folders=folders)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, values in seen.items():
        assert relative(torch.load(f"{path}.pt"), run(dense_of(values))) < 1e-5


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)])
def test_loras_of_every_kind_are_exact(quant_type, nested, path):
    seen = write_bnb(path, tiny_flux(), quant_type, nested=nested)
    patcher, reference = load_diffusion_model(path), dense_of(seen)
    without = run(reference)
    stacks = {kind: [(lora_for(seen, kind), 0.8)] for kind in LORA_KINDS}
    stacks["stack"] = [*stacks["lora"], *stacks["dora"]]
    errors = {
        kind: error_by_effect(run(patched(patcher, *stack)), run(patched(reference, *stack)),
                              without) for kind, stack in stacks.items()
    }
    assert max(errors.values()) < LIMIT, errors
    assert len(packed_layers(patcher)) == 19
