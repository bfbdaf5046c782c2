"""Blueprints of the editor's node library: what they hold and how ComfyUI serves them.

That they run is tested with the example workflows, and that they open with the editor.
"""
import json
import re

import pytest
from blueprint_workflows import as_workflow

from devtools.host.server import PACK
from devtools.workflows import FOLDER, blueprint_paths
from devtools.workflows.api_format import SUBGRAPH_INPUT, to_api

FILES = blueprint_paths()
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


OF_EXAMPLES = {
    "Flux.1 dev Text to Image (Featherweight)": "Flux.1 dev GGUF",
    "Flux.1 Kontext Image Edit (Featherweight)": "Flux.1 Kontext GGUF",
    "Qwen-Image Text to Image (Featherweight)": "Qwen-Image GGUF",
    "Qwen-Image-Edit (Featherweight)": "Qwen-Image-Edit 2511 GGUF with mmproj",
    "Wan 2.2 14B Text to Video (Featherweight)": "Wan 2.2 14B GGUF video in 4 steps",
    "Z-Image Turbo Text to Image (Featherweight)": "Z-Image Turbo packed to fit your GPU",
}
OUTSIDE = ("SaveImage", "SaveVideo")


def steps_of(prompt: dict) -> list[str]:
    """Returns what each node computes, from its first source on, but for those that save."""
    def expand(value):
        if not isinstance(value, list):
            return value
        node = prompt[value[0]]
        inputs = {name: expand(given) for name, given in sorted(node["inputs"].items())}
        return [node["class_type"], inputs, value[1]]

    return sorted(json.dumps(expand([number, 0])) for number, node in prompt.items()
                  if node["class_type"] not in OUTSIDE)


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_a_blueprint_of_an_example_computes_what_the_example_does(name, object_info):
    path, = (path for path in FILES if path.stem == name)
    example = json.loads((FOLDER / f"{OF_EXAMPLES[name]}.json").read_text(encoding="utf-8"))
    assert steps_of(to_api(as_workflow(path, object_info), object_info)) == steps_of(
        to_api(example, object_info))
