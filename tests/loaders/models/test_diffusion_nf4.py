"""Diffusion models that bitsandbytes packed: files and folders run as the host runs their values,
and stay packed."""
import json
import logging
import os
import subprocess
import sys

import comfyui_and_pack

import comfy.model_management
import comfy.sd
import pytest
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import FAMILIES, host_patcher, random_weights, relative_error
from families import run as run_family
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
from safetensors.torch import load_file, save_file

from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.patcher import PackedPatcher
from featherweight.ops.tensor.packed_layout import is_packed

pytest.importorskip("bitsandbytes", reason="it writes the files")
from devtools.files.bnb_files import write_bnb, write_bnb_int8

PREFIX = "model.diffusion_model."
KINDS = {
    "NF4": {}, "NF4 double-quantised": {"nested": True}, "FP4": {"quant_type": "fp4"},
    "NF4 stored as bf16 in blocks of 128": {"storage": torch.bfloat16, "block_length": 128},
    "FP4 double-quantised, prefix": {"quant_type": "fp4", "nested": True, "prefix": PREFIX}
}


pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


def as_in_diffusers(name: str):
    """The weights of a family as diffusers keeps them, and a function that gives such values to the
    host's own model."""
    family, weights = FAMILIES[name], random_weights(FAMILIES[name])
    table = DIFFUSERS[name](family.config)
    stored = {key: value.contiguous() for key, value in in_diffusers_names(weights, table).items()}
    return stored, lambda seen: host_patcher(in_the_hosts_names(seen, weights, table), family)


def write_folder(folder, tensors, shards: int, config=None, **kind):
    """A folder as diffusers saves it, in several files; returns the values a reader should see."""
    folder.mkdir(parents=True)
    whole = folder / "whole.safetensors"
    seen = write_bnb(whole, tensors, **kind)
    stored = load_file(whole)
    whole.unlink()
    index = {}
    for part in range(shards):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-{shards:05d}.safetensors"
        keys = list(stored)[part::shards]  # the parts of one weight lie in different files too
        save_file({key: stored[key] for key in keys}, folder / file)
        index |= dict.fromkeys(keys, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}))
    config = config or {
        "_class_name": "FluxTransformer2DModel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_file_runs_as_in_the_host_and_stays_packed(kind, path, caplog):
    seen = write_bnb(path, tiny_flux(), **KINDS[kind])
    with caplog.at_level(logging.INFO):
        patcher = load_diffusion_model(path)
    assert f"{len(seen)} tensors (F32 {len(seen) - 19}, {kind[:3]} 19)" in caplog.text
    assert relative(run(patcher), run(dense_of(seen))) < 1e-5
    assert len(packed_layers(patcher)) == 19
    # Double-quantised scales are held as float32: 4 bytes for 64 values in place of 1.
    values = sum(value.numel() for value in seen.values())
    assert patcher.model_size() <= 1.02 * os.path.getsize(path) + (
        values / 64 * 3 if "double" in kind else 0
    )


WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None  # an import of it fails
sys.path[:0] = {folders!r}
import comfyui_and_pack
import torch
from featherweight.loaders.models.diffusion import load_diffusion_model
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


@pytest.mark.parametrize(("name", "kind"), [
    ("flux-dev", "NF4 double-quantised"), ("flux2", "NF4"), ("sd3.5", "FP4")
])
def test_a_folder_of_diffusers_runs_packed(name, kind, tmp_path):
    family, (stored, of_the_host) = FAMILIES[name], as_in_diffusers(name)
    expected = of_the_host(
        write_folder(tmp_path / "package" / "transformer", stored, 3, **KINDS[kind]))
    patcher = load_diffusion_model(tmp_path / "package" / "transformer")
    assert relative_error(run_family(patcher, family), run_family(expected, family)) < 1e-5
    matrices = [key for key, values in expected.model.diffusion_model.state_dict().items()
                if values.ndim == 2 and key.endswith(".weight")]
    dense_ones = [
        key for key in matrices if not is_packed(patcher.model.diffusion_model.get_parameter(key))
    ]
    assert not dense_ones


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_int8_runs_the_float_product_of_its_values(prefix, path):
    seen = write_bnb_int8(path, tiny_flux(), prefix=prefix)
    patcher = load_diffusion_model(path)
    assert relative(run(patcher), run(dense_of(seen))) < 1e-6
    assert len(packed_layers(patcher)) == 19 and patcher.model_size() <= 1.02 * os.path.getsize(
        path
    )


def test_int8_in_diffusers_names_stays_packed(path):
    family, (stored, of_the_host) = FAMILIES["flux-dev"], as_in_diffusers("flux-dev")
    expected, patcher = of_the_host(write_bnb_int8(path, stored)), load_diffusion_model(path)
    assert relative_error(run_family(patcher, family), run_family(expected, family)) < 1e-5
    for name, values in expected.model.diffusion_model.state_dict().items():
        if values.ndim == 2:
            weight = patcher.model.diffusion_model.get_parameter(name)
            assert is_packed(weight) and torch.equal(weight.dequantize(), values)


def test_files_without_packed_weights_are_the_hosts(path):
    save_file(
        {
            name: value.bfloat16() if value.ndim == 2 else value
            for name, value in tiny_flux().items()
        }, path)
    assert not needs_own_reader(path)
    patcher = load_diffusion_model(path)
    assert (
        not isinstance(patcher, PackedPatcher)
        and patcher.cached_patcher_init[0] is comfy.sd.load_diffusion_model
    )
