"""The example workflows fit the server's nodes and say where their files belong."""
import json

import pytest

from devtools import ROOT
from devtools.host.environment import HOST_VERSION
from devtools.workflows import WORKFLOWS
from devtools.workflows.api_format import AFTER_GENERATE, NOTES, has_control, is_widget
from devtools.workflows.editor import as_ui
from devtools.workflows.parts import PICTURE

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
DEMOS = [path for path in EXAMPLES if path.stem.startswith("Featherweight demo")]
SOURCE = "https://huggingface.co/"


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


def schema_inputs(info) -> dict[str, tuple]:
    """Name -> (type or list of choices, options) of the inputs of a node, in the order of the
    editor."""
    inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {
        name: (kind, options[0] if options else {}) for name, (kind, *options) in inputs.items()
    }


def widget_values(node, info) -> dict[str, object]:
    """Name -> value of the widgets; fails where one has none. The editor leaves out what an older
    node has no widget for."""
    values, found = list(node["widgets_values"]), {}
    for name, (kind, options) in schema_inputs(info).items():
        if is_widget(kind, options):
            assert values, f"{node['type']} has no value for {name}"
            found[name] = values.pop(0)
            if has_control(name, options):
                assert values.pop(0) in AFTER_GENERATE
            if options.get("image_upload"):
                assert values.pop(0) == "image"
    return found


def is_file(value) -> bool:
    """Whether a value names a model's file or folder."""
    return isinstance(value, str) and (
        value.endswith((".safetensors", ".gguf", "-AWQ")) or "/" in value)


def choices(kind, options) -> list:
    """What a combo offers. One whose other inputs depend on the choice has a key for each."""
    offered = kind if isinstance(kind, list) else options["options"]
    return [choice["key"] if isinstance(choice, dict) else choice for choice in offered]


def note_of(workflow) -> str:
    return next(node for node in workflow["nodes"] if node["type"] in NOTES)["widgets_values"][0]


def files_of(workflow) -> dict[str, str]:
    """Path below `models` -> folder of the host (the first part of the path), by the tree that the
    note draws."""
    found, parents = {}, []
    for line in note_of(workflow).splitlines():
        indent, branch, name = line.partition("── ")
        if not branch:
            continue
        parents[len(indent) // 4:] = [name.split("   ")[0].rstrip("/")]
        if len(parents) > 2:
            found["/".join(parents[1:])] = parents[1]
    return found


def where(name, workflow) -> str:
    """The path below `models` of a file that a loader names."""
    return next((path for path, folder in files_of(workflow).items() if path == f"{folder}/{name}"),
                "")


@each(EXAMPLES)
def test_nodes_and_links_fit_the_servers_nodes(path, object_info):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {
        link: (source, output, target, slot, kind)
        for link, source, output, target, slot, kind in workflow["links"]
    }
    assert (
        workflow["version"] == 0.4
        and len(nodes) + 1 == len(workflow["nodes"])
        and len(links) == len(workflow["links"])
    )
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(links)
    linked_inputs = {(node["id"], slot): entry["link"] for node in nodes.values()
                     for slot, entry in enumerate(node["inputs"]) if entry["link"] is not None}
    linked_outputs = {(node["id"], slot): entry["links"] for node in nodes.values()
                      for slot, entry in enumerate(node["outputs"]) if entry["links"]}
    assert linked_inputs == {
        (target, slot): link for link, (_, _, target, slot, _) in links.items()
    }
    assert {link: place for place, of_output in linked_outputs.items() for link in of_output} == {
        link: (source, output) for link, (source, output, *_) in links.items()}
    for source, output, target, slot, kind in links.values():
        entry = nodes[target]["inputs"][slot]
        wanted, _ = schema_inputs(object_info[nodes[target]["type"]])[entry["name"]]
        assert object_info[nodes[source]["type"]]["output"][output] == kind and wanted in (
            kind,
            "*",
        )
    for node in nodes.values():
        given = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        needed = object_info[node["type"]]["input"].get("required", {})
        inputs = schema_inputs(object_info[node["type"]])
        assert given >= {name for name in needed if not is_widget(*inputs[name])}


@each(EXAMPLES)
def test_widgets_hold_values_that_the_server_takes(path, object_info):
    for node in read(path)["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = schema_inputs(object_info[node["type"]])
        for name, value in widget_values(node, object_info[node["type"]]).items():
            kind, options = inputs[name]
            if isinstance(kind, list) or "COMBO" in kind:
                # which two GPUs have
                given_by_the_user = is_file(value) or value in (PICTURE, "gpu:1")
                assert given_by_the_user or value in choices(kind, options), (node["type"], name)
            elif kind in ("INT", "FLOAT", "FLOAT,INT"):
                assert isinstance(value, (int, float)) and not isinstance(value, bool)
                assert kind != "INT" or value == int(value), (node["type"], name)
                assert options.get("min", value) <= value <= options.get("max", value), (
                    node["type"],
                    name,
                )
            else:
                assert isinstance(value, {"STRING": str,
                                          "BOOLEAN": bool}[kind]), (node["type"], name)


@each(EXAMPLES)
def test_the_note_says_where_each_file_belongs(path, server, object_info):
    workflow, folders = read(path), set(server.get_json("/models"))
    named = {value for node in workflow["nodes"] if node["type"] not in NOTES
             for name, value in widget_values(node, object_info[node["type"]]).items()
             if is_file(value) and name not in ("filename_prefix", "prefix")}
    assert named and set(files_of(workflow).values()) <= folders
    for name in named:
        assert where(name, workflow), name
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):  # what the editor offers to download
            assert where(model["name"], workflow) == f"{model['directory']}/{model['name']}"
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith(
                SOURCE
            ) and f"[{model['name']}]({model['url']})" in note_of(workflow)


MOST_USED = ("Featherweight demo", "Flux.1 dev GGUF with GGUF T5", "Qwen-Image GGUF",
             "Z-Image Turbo GGUF", "SDXL GGUF with LCM and style LoRAs")


@each(EXAMPLES)
def test_app_mode_has_widgets_that_are_no_links_and_all_that_one_sampler_saves(path, object_info):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    samplers = [node for node in nodes.values() if node["type"] == "KSampler"]
    saves = [number for number, node in nodes.items()
             if node["type"] in ("SaveImage", "SaveVideo") and len(samplers) < 2]
    marked = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
    assert marked["outputs"] == saves and bool(marked["inputs"]) == bool(saves)
    for number, name in marked["inputs"]:
        node = nodes[number]
        assert name in widget_values(node, object_info[node["type"]])
        assert not [slot for slot in node["inputs"] if slot["name"] == name and slot["link"]]
    if path.stem in MOST_USED:
        assert {"text", "width", "height", "seed", "steps"} <= {
            name for _, name in marked["inputs"]
        }


def test_workflows_are_what_their_description_gives(server, object_info):
    version = server.system_stats()["system"]["comfyui_version"]
    if version != HOST_VERSION:
        pytest.skip(
            f"the workflows hold a value for each widget of ComfyUI {HOST_VERSION}, this is"
            f" {version}"
        )
    written = {
        workflow.name: as_ui(workflow, object_info) for workflow in (make() for make in WORKFLOWS)
    }
    assert {path.stem for path in EXAMPLES} == set(written)
    for name, workflow in written.items():
        path = ROOT / "example_workflows" / f"{name}.json"
        assert workflow == read(path), "run `python -m devtools.workflows`"
