"""Blueprints of the editor's node library: what they hold and how ComfyUI serves them.

That they run is tested with the example workflows, and that they open with the editor.
"""
import json
import re

import pytest

from devtools.host.environment import HOST_VERSION
from devtools.host.server import PACK
from devtools.workflows import BLUEPRINT_FOLDER, BLUEPRINTS
from devtools.workflows.api_format import SUBGRAPH_INPUT, to_api
from devtools.workflows.editor import as_ui
from devtools.workflows.subgraphs import as_blueprint, as_workflow

FILES = sorted(BLUEPRINT_FOLDER.glob("*.json"))
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@EACH_FILE
def test_the_host_serves_it_under_its_name(path, server):
    (number, entry), = (
        (number, entry) for number, entry in server.get_json("/global_subgraphs").items()
        if entry["name"] == path.stem
    )
    assert entry["info"]["node_pack"] == f"custom_nodes.{PACK}"
    served = server.get_json(f"/global_subgraphs/{number}")["data"]
    assert served == path.read_text(encoding="utf-8")


@EACH_FILE
def test_its_description_says_which_file_belongs_into_which_folder(path, server):
    written = json.loads(path.read_text(encoding="utf-8"))
    subgraph, = written["definitions"]["subgraphs"]
    description = written["extra"]["BlueprintDescription"]
    assert subgraph["description"] == description and written["extra"]["BlueprintSearchAliases"]
    files = re.search(r" Files, in ComfyUI/models: (.*)\.$", description)[1].split(", ")
    named = {
        f"{file['directory']}/{file['name']}"
        for node in subgraph["nodes"] for file in node["properties"].get("models", [])
    }
    assert named and set(files) == named
    assert {file.partition("/")[0] for file in files} <= set(server.get_json("/models"))


@EACH_FILE
def test_each_widget_of_the_node_sets_a_widget_inside(path, object_info):
    written = json.loads(path.read_text(encoding="utf-8"))
    (node,), (subgraph,) = written["nodes"], written["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == path.stem
    names = [slot["name"] for slot in subgraph["inputs"]]
    assert [slot["name"] for slot in node["inputs"]] == names and len({*names}) == len(names)
    inside = {node["id"]: node for node in subgraph["nodes"]}
    ends = {slot["name"]: set() for slot in subgraph["inputs"]}
    for link in subgraph["links"]:
        if link["origin_id"] == SUBGRAPH_INPUT:
            target = inside[link["target_id"]]
            slot = target["inputs"][link["target_slot"]]
            assert slot["link"] == link["id"]
            ends[names[link["origin_slot"]]].add(slot.get("widget", {}).get("name"))
    assert all(ends.values())
    assert [name for name, widgets in ends.items() if widgets != {None}] == [
        slot["name"] for slot in node["inputs"] if "widget" in slot]


@pytest.mark.parametrize("make", BLUEPRINTS, ids=lambda make: make.__name__)
def test_as_one_node_a_workflow_is_what_it_was(make, object_info):
    blueprint = make()
    flat = json.dumps(to_api(as_workflow(blueprint, object_info), object_info))
    host = len(blueprint.workflow.nodes) + 2
    assert f'"{host}:' in flat
    assert json.loads(flat.replace(f'"{host}:', '"')) == to_api(
        as_ui(blueprint.workflow, object_info), object_info)


def test_the_files_are_what_their_description_gives(server, object_info):
    version = server.system_stats()["system"]["comfyui_version"]
    if version != HOST_VERSION:
        pytest.skip(f"the files have the inputs of ComfyUI {HOST_VERSION}, this is {version}")
    made = {made.name: as_blueprint(made, object_info) for made in (make() for make in BLUEPRINTS)}
    assert {path.stem for path in FILES} == set(made)
    for path in FILES:
        assert json.loads(path.read_text(encoding="utf-8")) == made[path.stem], (
            "run `python -m devtools.workflows`")
