"""Workflows as other people share them, with the node ids of other packs, open in the real editor and run."""
import io
import json
import os
import shutil
from pathlib import Path

import legacy_ids
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.files.gguf_files import write_gguf
from devtools.host.browser import COMPLAINTS, RED, UNKNOWN

WORKFLOWS = sorted(Path(__file__).with_name("legacy_workflows").glob("*.json"))
FOR_THE_SERVER = [path for path in WORKFLOWS if path.stem.startswith("api ")]
FOR_THE_EDITOR = [path for path in WORKFLOWS if path.stem.startswith("ui ")]
LOADERS = set(legacy_ids.LEGACY)


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_files(models: Path):
    """The files that the workflows name, in folders of their own: the demo's, and Flux and CLIP-L as plain files."""
    folders = {key: models / key / "legacy" for key in ("diffusion_models", "text_encoders", "checkpoints", "vae")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(models / "diffusion_models" / demo.MODEL_NAME, folders["diffusion_models"] / "flux-Q8_0.gguf")
    shutil.copy(models / "text_encoders" / demo_files.ENCODER_NAME, folders["text_encoders"] / "clip_l-Q8_0.gguf")
    vae = load_file(models / "vae" / demo_files.VAE_NAME)
    write_gguf(folders["vae"] / "vae-F16.gguf", vae, lambda name, values: "F16", architecture="pig")
    fp8 = {name: torch.from_numpy(value).to(torch.float8_e4m3fn if value.ndim == 2 else torch.float16)
           for name, value in tiny_models.flux(context=768).items()}
    save_file(fp8, folders["diffusion_models"] / "flux_fp8.safetensors")
    vae = {f"vae.{name}": torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()}
    save_file({f"model.diffusion_model.{name}": value for name, value in fp8.items()} | vae,
              folders["checkpoints"] / "flux_fp8_checkpoint.safetensors")
    generator = torch.Generator().manual_seed(0)
    encoder = {name: torch.randn(shape, generator=generator) * 0.03 + ("norm" in name and name.endswith("weight"))
               for name, shape in tiny_models.clip_l_shapes().items()}
    save_file(encoder, folders["text_encoders"] / "clip_l.safetensors")


@pytest.fixture(scope="module")
def files(server):
    write_files(server.base / "models")


@pytest.fixture(scope="module")
def editor(browser, server, files):
    browser.open_editor(server)
    return browser


def prompt_of_the_editor(editor) -> dict:
    """What the editor sends to the server when it runs the open workflow."""
    return editor.evaluate("app.graphToPrompt().then(prompt => prompt.output)")


def assert_makes_a_picture(server, prompt):
    run = server.queue(prompt)
    entry = next(entry for output in run.outputs.values() for entry in output.get("images", []))
    picture = np.asarray(Image.open(io.BytesIO(server.image(entry))), dtype=np.float32)
    assert picture.shape == (128, 128, 3) and picture.std(axis=(0, 1)).max() > 5


@each(FOR_THE_SERVER)
def test_an_api_workflow_runs(path, server, files):
    prompt = read(path)
    assert LOADERS & {node["class_type"] for node in prompt.values()}
    assert_makes_a_picture(server, prompt)
    assert "lora key not loaded" not in server.log()


@each(FOR_THE_EDITOR)
def test_the_editor_knows_every_node_finds_every_file_and_it_runs(path, server, editor):
    editor.open_workflow(path.name, path.read_text(encoding="utf-8"))
    assert LOADERS & set(editor.types())
    assert editor.types(UNKNOWN) == editor.types(RED) == editor.evaluate(COMPLAINTS) == []
    assert_makes_a_picture(server, prompt_of_the_editor(editor))


@pytest.mark.parametrize("pack", [
    {"cnr_id": "comfyui-gguf", "ver": "1.1.4"}, {"cnr_id": "ComfyUI-GGUF", "ver": "be2a083"}, {"cnr_id": "comfy-core"},
    {"aux_id": "city96/ComfyUI-GGUF"}, {}], ids=str)
def test_a_node_is_known_by_its_id_whatever_pack_the_file_names(pack, editor):
    workflow = read(next(path for path in FOR_THE_EDITOR if "old form" in path.stem))
    for node in workflow["nodes"]:
        if node["type"] in LOADERS:
            node["properties"] = {"Node name for S&R": node["type"], **pack}
    editor.open_workflow("pack.json", json.dumps(workflow))
    assert not editor.types(UNKNOWN)
    loader = next(node for node in prompt_of_the_editor(editor).values() if node["class_type"] == "UnetLoaderGGUF")
    assert loader["inputs"] == {"unet_name": os.path.join("legacy", "flux-Q8_0.gguf")}
