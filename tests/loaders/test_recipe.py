"""The recipe that each loader leaves with what it loads: called by the host, sent to another
process, read by a person."""
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

from comfyui_and_pack import HOST, PACK

import pytest
import recipe_process
import torch
from checkpoint_parts import checkpoint_shapes
from comfy.weight_adapter import LoRAAdapter
from pack_api import (
    load_checkpoint,
    load_diffusion_model,
    load_text_encoder,
    packed_layers,
    packed_operations,
    packed_tensor,
)
from patched_models import flux_file
from recipe_process import digest

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders.models.vae import load_vae
from featherweight.loaders.recipe import LOADERS, Recipe
from featherweight.ops.formats._names import format_named
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.patches.layer_patches import build_patches

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a diffusion model, a text encoder, and a checkpoint with both and a VAE."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(flux_file("Q8_0")[0], folder / "flux.gguf")
    write_random_gguf(folder / "clip_l.gguf", tiny_models.clip_l_shapes(), "Q8_0")
    write_random_gguf(folder / "checkpoint.gguf", checkpoint_shapes(), "Q8_0", None)
    write_random_gguf(folder / "vae.gguf",
                      {name: value.shape for name, value in tiny_models.autoencoder().items()},
                      "Q8_0")
    return folder


# Kind of recipe -> what loads a model that has it, from the folder above.
LOADS = {
    "diffusion model": lambda models: load_diffusion_model(
        models / "flux.gguf", compute="int8"
    ),
    "text encoder": lambda models: load_text_encoder([str(models / "clip_l.gguf")]).patcher,
    "diffusion model of a checkpoint": lambda models: load_checkpoint(
        str(models / "checkpoint.gguf")
    )[0],
    "text encoder of a checkpoint": lambda models: (
        load_checkpoint(str(models / "checkpoint.gguf"))[1].patcher
    ),
    "VAE of a checkpoint": lambda models: (
        load_checkpoint(str(models / "checkpoint.gguf"))[2].patcher
    ),
    "VAE": lambda models: load_vae(str(models / "vae.gguf")).patcher,
}


def test_each_kind_of_recipe_is_tested():
    assert LOADERS.keys() == LOADS.keys()


def recipe_of(patcher) -> Recipe:
    recipe, arguments = patcher.cached_patcher_init
    assert type(recipe) is Recipe and arguments == ()
    return recipe


@pytest.mark.parametrize("kind", LOADS)
def test_a_recipe_loads_the_same_model_again(kind, models):
    patcher = LOADS[kind](models)
    recipe = recipe_of(patcher)
    assert recipe.loader == kind
    for again in (recipe(), recipe(disable_dynamic=True), copy.deepcopy(recipe)()):
        assert again.model is not patcher.model and digest(again) == digest(patcher)
        assert recipe_of(again).paths == recipe.paths


def test_a_recipe_cannot_be_changed(models):
    with pytest.raises(AttributeError):
        recipe_of(LOADS["diffusion model"](models)).loader = "text encoder"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The pack in another folder."""
    other = tmp_path_factory.mktemp("elsewhere v1.0") / "featherweight-copy"
    for folder in ("loaders", "ops", "nodes"):
        shutil.copytree(PACK / folder, other / folder,
                        ignore=shutil.ignore_patterns("__pycache__", "docs"))
    for name in ("__init__.py", "child_process.py"):
        shutil.copyfile(PACK / name, other / name)
    return other


def test_recipes_load_in_a_process_with_the_pack_in_another_folder(models, other, tmp_path):
    patchers = [load(models) for load in LOADS.values()]
    (tmp_path / "recipes.pickle").write_bytes(
        pickle.dumps([recipe_of(patcher) for patcher in patchers]))
    command = [
        sys.executable, recipe_process.__file__,
        str(HOST),
        str(other),
        str(tmp_path / "recipes.pickle"),
        str(packed_layers.PLAIN_TABLE_BYTES)
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[str(recipe_of(patcher)), *digest(patcher)] for patcher in patchers]


UNPICKLING = """
import sys, recipe_process
_, host, pack, folder = sys.argv
name = recipe_process.import_pack(host, pack)
import pathlib, torch
torch.set_num_threads(1)
for file in pathlib.Path(folder).glob("*.blocks"):
    blocks = torch.load(file, weights_only=False)
    modules = {module for block in blocks for module in block.modules()}
    bases = [type(module).__mro__[1] for module in modules]
    with torch.no_grad():
        outputs = [block(torch.ones(2, 256)) for block in blocks]
    ours = sum(base.__module__.startswith(f"{name}.ops") for base in bases)
    torch.save([*outputs, ours], file.with_suffix(".outputs"))
"""
# types of one file, and those made of a file's numbers
PICKLED = ("Q8_0", "NF4", "NF4_128", "INT8", "Q4_K_256_2x4")


def blocks_of(format_name: str) -> list[torch.nn.Module]:
    """Two models, the second with the layer of the first, and one with a LoRA, in it."""
    packed_format = INT8.of_columns(256) if format_name == "INT8" else format_named(format_name)
    count = 256 * 256 // packed_format.block_length
    codes = torch.randint(0, 60, (count, packed_format.block_bytes), dtype=torch.uint8)
    scale = torch.rand(count) / 30 if packed_format.qparams else None
    weight = packed_tensor(packed_format, codes, (256, 256), scale=scale)
    plain, int8 = (packed_operations(compute=compute).Linear(256, 256, dtype=torch.float32)
                   for compute in ("exact", "int8"))
    for layer in (plain, int8):
        layer.load_state_dict({"weight": weight, "bias": torch.randn(256)})
    lora = LoRAAdapter(set(), (torch.randn(256, 4), torch.randn(4, 256), None, None, None, None))
    int8.lora = build_patches("w", [(0.5, lora, 1.0, None, None)], weight.shape,
                              torch.device("cpu"), torch.float32)
    return [torch.nn.Sequential(plain), torch.nn.Sequential(plain, torch.nn.ReLU(), int8)]


@pytest.fixture(scope="module")
def unpickled(other, tmp_path_factory):
    """Format -> (the blocks that were pickled, what they gave in a process with the pack in another
    folder)."""
    folder = tmp_path_factory.mktemp("pickles")
    blocks = {name: blocks_of(name) for name in PICKLED}
    for name, modules in blocks.items():
        torch.save(modules, folder / f"{name}.blocks")
    # of `dev.py matrix`: the packages of another ComfyUI
    given = [path for path in [os.environ.get("PYTHONPATH")] if path]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACK / "tests" / "support"), str(PACK), *given])
    }
    done = subprocess.run([sys.executable, "-c", UNPICKLING, *map(str, (HOST, other, folder))],
                          capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return {
        name: (modules, torch.load(folder / f"{name}.outputs", weights_only=False))
        for name, modules in blocks.items()
    }


@pytest.mark.parametrize("format_name", PICKLED)
def test_layers_unpickle_in_a_process_with_the_pack_in_another_folder(format_name, unpickled):
    modules, (*outputs, count) = unpickled[format_name]
    with torch.no_grad():
        assert all(
            torch.equal(output, module(torch.ones(2, 256)))
            for output, module in zip(outputs, modules, strict=True))
    assert count == 2  # the shared one once
