"""Workflows as other people share them, with the node ids of other packs, open in the real editor
and run."""
import json
import os

import legacy_ids
import pytest
from legacy_files import OTHER_ON_A_GPU, WORKFLOWS, write_files

from devtools.host.browser import UNKNOWN
from devtools.workflows.api_format import to_api, widget_values

FOR_THE_SERVER = [path for path in WORKFLOWS if path.stem.startswith("api ")]
FOR_THE_EDITOR = [path for path in WORKFLOWS if path.stem.startswith("ui ")]
LOADERS = set(legacy_ids.LEGACY)


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files(server):
    write_files(server.base / "models")


@pytest.fixture(scope="module")
def editor(browser, server, files):
    browser.open_editor(server)
    yield browser
    browser.close_editor()


def assert_makes_a_picture(server, prompt):
    picture = server.pixels(server.queue(prompt))
    assert picture.shape == (128, 128, 3) and picture.std(axis=(0, 1)).max() > 5


@each([pytest.param(path, marks=pytest.mark.not_on_fake_gpus(reason="fp8 is ComfyUI's there"))
       if path.stem == OTHER_ON_A_GPU else path for path in FOR_THE_SERVER])
def test_an_api_workflow_runs(path, server, files):
    prompt = read(path)
    assert LOADERS & {node["class_type"] for node in prompt.values()}
    assert_makes_a_picture(server, prompt)
    assert "lora key not loaded" not in server.log()


@each([path for path in FOR_THE_EDITOR if "nunchaku" in path.stem])
def test_a_workflow_of_the_editor_has_its_values_in_order_and_runs(path, server, files):
    """Where there is no browser too."""
    object_info, workflow = server.object_info(), read(path)
    for node in workflow["nodes"]:
        values = widget_values(node, object_info[node["type"]])
        if node["type"] in LOADERS:
            names = [name for name in legacy_ids.INPUTS[node["type"]]
                     if name not in ("model", "clip")]
            assert list(values.items()) == list(zip(names, node["widgets_values"]))
    assert_makes_a_picture(server, to_api(workflow, object_info))


@each(FOR_THE_EDITOR)
def test_the_editor_knows_every_node_finds_every_file_and_it_runs(path, server, editor):
    editor.open_workflow(path.name, path.read_text(encoding="utf-8"))
    assert LOADERS & set(editor.types())
    assert editor.complaints() == []
    assert_makes_a_picture(server, editor.prompt())


@pytest.mark.parametrize(
    "pack", [{"cnr_id": "ComfyUI-GGUF", "ver": "be2a083"}, {"aux_id": "city96/ComfyUI-GGUF"}],
    ids=str)
def test_a_node_is_known_by_its_id_whatever_pack_the_file_names(pack, editor):
    workflow = read(next(path for path in FOR_THE_EDITOR if "old form" in path.stem))
    for node in workflow["nodes"]:
        if node["type"] in LOADERS:
            node["properties"] = {"Node name for S&R": node["type"], **pack}
    editor.open_workflow("pack.json", json.dumps(workflow))
    assert not editor.types(UNKNOWN)
    loader = next(node for node in editor.prompt().values()
                  if node["class_type"] == "UnetLoaderGGUF")
    assert loader["inputs"] == {"unet_name": os.path.join("legacy", "flux-Q8_0.gguf")}
