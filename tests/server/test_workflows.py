"""Examples and blueprints fit the server's nodes and say where their files belong."""
import re

import pytest

from devtools.workflows import DEMO, blueprint_paths, demo_paths, example_paths
from devtools.workflows.api_format import (
    AFTER_GENERATE,
    SUBGRAPH_INPUT,
    SUBGRAPH_OUTPUT,
    has_control,
    is_widget,
)
from devtools.workflows.stand_ins import PICTURE
from devtools.workflows.workflow import Workflow

EXAMPLES = [*example_paths(), *demo_paths()]
SOURCE = re.compile(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/(?:\S+/)?([^/\s]+)")


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


each_file = each([*EXAMPLES, *blueprint_paths()])


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
        if options.get("image_upload"):
            found[name] = values.pop(0) if values else PICTURE
        elif is_widget(kind, options):
            assert values, f"{node['type']} has no value for {name}"
            found[name] = values.pop(0)
            if has_control(name, options):
                assert values.pop(0) in AFTER_GENERATE
    return found


def is_file(value) -> bool:
    """Whether a value names a model's file or folder."""
    return isinstance(value, str) and (
        value.endswith((".safetensors", ".gguf", "-AWQ")) or "/" in value)


def choices(kind, options) -> list:
    """What a combo offers. One whose other inputs depend on the choice has a key for each."""
    offered = kind if isinstance(kind, list) else options["options"]
    return [choice["key"] if isinstance(choice, dict) else choice for choice in offered]


def graph_of(workflow) -> tuple[dict, dict]:
    """Nodes by their ids, and links by theirs: (source, output, target, slot, type).

    Of a blueprint: of what is inside it.
    """
    nodes = {node["id"]: node for node in workflow.nodes}
    assert len(nodes) == len(workflow.nodes)
    if workflow.subgraphs:
        ends = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [(link["id"], *map(link.get, ends)) for link in workflow.subgraphs[0]["links"]]
    else:
        links = workflow.graph["links"]
        assert workflow.graph["last_node_id"] >= max(nodes)
        assert workflow.graph["last_link_id"] >= max(number for number, *_ in links)
    assert len({number for number, *_ in links}) == len(links)
    return nodes, {number: ends for number, *ends in links}


def ends_of(nodes, graph) -> tuple[dict, dict]:
    """Link -> (node, slot) by what the nodes say, and by what a subgraph's border says: where
    links begin, and where they end."""
    starts, ends = {}, {}
    for number, node in nodes.items():
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                ends[entry["link"]] = (number, slot)
        for slot, entry in enumerate(node["outputs"]):
            starts |= dict.fromkeys(entry["links"] or (), (number, slot))
    if "inputNode" in graph:
        for slot, entry in enumerate(graph["inputs"]):
            starts |= dict.fromkeys(entry["linkIds"], (SUBGRAPH_INPUT, slot))
        for slot, entry in enumerate(graph["outputs"]):
            ends |= dict.fromkeys(entry["linkIds"], (SUBGRAPH_OUTPUT, slot))
    return starts, ends


@each_file
def test_nodes_and_links_fit_the_servers_nodes(path, object_info):
    workflow = Workflow(path)
    nodes, links = graph_of(workflow)
    assert workflow.graph["version"] == 0.4
    starts, ends = ends_of(nodes, (workflow.subgraphs or [workflow.graph])[0])
    assert starts == {link: (source, output) for link, (source, output, *_) in links.items()}
    assert ends == {link: (target, slot) for link, (_, _, target, slot, _) in links.items()}
    for source, output, target, slot, kind in links.values():
        if source in nodes:
            assert object_info[nodes[source]["type"]]["output"][output] == kind
        if target in nodes:
            entry = nodes[target]["inputs"][slot]
            wanted, _ = schema_inputs(object_info[nodes[target]["type"]])[entry["name"]]
            assert wanted == "*" or (
                kind == "COMBO" if isinstance(wanted, list) else kind in wanted.split(","))
    for node in nodes.values():
        given = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        needed = object_info[node["type"]]["input"].get("required", {})
        inputs = schema_inputs(object_info[node["type"]])
        assert given >= {name for name in needed if not is_widget(*inputs[name])}


@each_file
def test_widgets_hold_values_that_the_server_takes(path, object_info):
    for node in Workflow(path).nodes:
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
                kinds = {"STRING": str, "STRING,FLOAT,INT": (str, int, float), "BOOLEAN": bool}
                assert isinstance(value, kinds[kind]), (node["type"], name)


@each_file
def test_the_note_says_where_each_file_belongs(path, server, object_info):
    workflow, folders = Workflow(path), set(server.get_json("/models"))
    assert workflow.note.startswith(f"# {path.stem}\n") and workflow.about and workflow.memory
    named = {value for node in workflow.nodes
             for name, value in widget_values(node, object_info[node["type"]]).items()
             if is_file(value) and name not in ("filename_prefix", "prefix")}
    places = {file.partition("/")[2]: file.partition("/")[0] for file in workflow.files}
    assert named and set(places.values()) <= folders
    assert named == set(places)


@each_file
def test_every_file_that_is_published_is_offered_for_download(path):
    """By the editor, whose button is for safetensors alone, and in the note."""
    workflow = Workflow(path)
    offered = {f"{model['directory']}/{model['name']}": model for model in workflow.models}
    made = path.stem.startswith(DEMO)
    assert set(offered) == {file for file in workflow.files if not made
                            and file.endswith((".gguf", ".safetensors"))}
    for model in offered.values():
        name = SOURCE.fullmatch(model["url"])[1]
        link = f"[{model['name']}]({model['url']})"
        if name != model["name"]:
            link += f", renamed from `{name}`"
        assert link in workflow.note
    for node in workflow.nodes:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"]


MOST_USED = (DEMO, "Flux.1 dev GGUF", "Qwen-Image GGUF", EXAMPLES[0].stem,
             "SDXL GGUF with two LoRAs")


@each(EXAMPLES)
def test_app_mode_has_widgets_that_are_no_links_and_all_that_one_sampler_saves(path, object_info):
    workflow = Workflow(path)
    nodes = {node["id"]: node for node in workflow.nodes}
    samplers = [node for node in nodes.values() if node["type"] == "KSampler"]
    saves = [number for number, node in nodes.items()
             if node["type"] in ("SaveImage", "SaveVideo") and len(samplers) < 2]
    marked = workflow.graph["extra"].get("linearData", {"inputs": [], "outputs": []})
    assert marked["outputs"] == saves and bool(marked["inputs"]) == bool(saves)
    for number, name in marked["inputs"]:
        node = nodes[number]
        assert name in widget_values(node, object_info[node["type"]])
        assert not [slot for slot in node["inputs"] if slot["name"] == name and slot["link"]]
    if path.stem in MOST_USED:
        assert {"text", "width", "height", "seed", "steps"} <= {
            name for _, name in marked["inputs"]
        }


@each(example_paths())
def test_an_example_names_no_image_so_that_the_editor_takes_one_that_the_user_has(path):
    """ComfyUI's own is not there with --base-directory."""
    workflow = Workflow(path)
    assert not [node for node in workflow.types("LoadImage") if node["widgets_values"]]
    assert PICTURE not in workflow.note


@each(example_paths())
def test_an_example_needs_only_what_everyone_can_download(path):
    workflow = Workflow(path)
    folders = {file.partition("/")[2] for file in workflow.files
               if not file.endswith((".gguf", ".safetensors"))}
    assert workflow.models and all("hf download " in workflow.note for _ in folders)
    assert "clone" not in workflow.note


def test_the_first_example_takes_at_most_9_gb_of_downloads_and_says_so():
    workflow = Workflow(example_paths()[0])
    assert workflow.files.keys() == {
        f"{model['directory']}/{model['name']}" for model in workflow.models}
    total = sum(float(size.removesuffix(" GB")) for size in workflow.files.values())
    assert total <= 9 and f"{total:.1f} GB to download in all" in workflow.about


@each(demo_paths())
def test_a_demo_says_that_its_models_come_with_the_repository_alone(path):
    assert "**Only with a clone of this pack's repository:**" in Workflow(path).note


def test_no_two_files_have_one_id():
    ids = [workflow.graph.get("id") or workflow.subgraphs[0]["id"]
           for workflow in map(Workflow, [*EXAMPLES, *blueprint_paths()])]
    assert len(ids) == len(set(ids))
