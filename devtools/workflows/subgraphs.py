"""A part of a workflow as one node of the editor, a subgraph, and blueprints: subgraphs that the
editor's node library offers."""
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from devtools.host.server import PACK
from devtools.workflows.api_format import SUBGRAPH_INPUT, SUBGRAPH_OUTPUT, is_widget, widget_values
from devtools.workflows.editor import (
    GAP,
    MARGIN,
    OWN_VERSION,
    SAVERS,
    WIDTH,
    WORDS,
    Node,
    Workflow,
    as_ui,
    form,
    note_node,
    settings,
    widget_slot,
)

CATEGORY = "Featherweight"
OUTSIDE = ("LoadImage", "PreviewAny", "FeatherweightInspectModelFile", *SAVERS)
HOST_WIDTH = 460  # of the node that shows a subgraph
SLOTS_WIDTH = 240  # of the two parts of a subgraph that stand for its inputs and its outputs
TEXT_HEIGHT = 100  # of a text of several lines
TEXTS = ("text", "prompt")


@dataclass
class Blueprint:
    """workflow: its name is the node's, its `about` says what the node does. aliases: words that
    find it. outside: those of its nodes that give the subgraph its inputs and use its outputs;
    none: by their types."""

    workflow: Workflow
    aliases: tuple[str, ...]
    outside: tuple[Node, ...] = ()

    @property
    def name(self) -> str:
        return self.workflow.name

    @property
    def inside(self) -> Workflow:
        """What the subgraph holds."""
        outside = self.outside or [node for node in self.workflow.nodes if node.type in OUTSIDE]
        return replace(self.workflow, columns=[
            {
                title: [node for node in group if node not in outside]
                for title, group in column.items()
            }
            for column in self.workflow.columns
        ])

    @property
    def description(self) -> str:
        files = ", ".join(f"{file.folder}/{file.name}" for file in self.inside.files)
        return f"{self.workflow.about} Files, in ComfyUI/models: {files}."


@dataclass
class Slot:
    """An input or an output of a subgraph. source: the node and its output that it comes from;
    None: it is a widget, which has a value. targets: the nodes and their inputs that it goes to."""

    name: str
    type: str
    source: tuple[int, int] | None
    targets: list[tuple[int, str]]
    value: object = None


def as_blueprint(blueprint: Blueprint, object_info: dict) -> dict:
    """The file of a blueprint: a workflow whose only node is the subgraph."""
    workflow = as_workflow(blueprint, object_info)
    host = workflow["nodes"][-1]
    for slot in host["inputs"]:
        slot["link"] = None
    for slot in host["outputs"]:
        slot["links"] = []
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [host | {"id": 1, "order": 0}],
        "links": [],
        "version": 0.4,
        "definitions": workflow["definitions"],
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": [*blueprint.aliases],
        },
    }


def as_workflow(blueprint: Blueprint, object_info: dict) -> dict:
    """The blueprint's workflow as the editor saves it, with the subgraph as its last node in place
    of the nodes inside it."""
    ui, number = as_ui(blueprint.workflow, object_info), blueprint.workflow.numbers
    nodes = {node["id"]: node for node in ui["nodes"]}
    links = [
        (source, output, target, nodes[target]["inputs"][slot]["name"])
        for _, source, output, target, slot, _ in ui["links"]
    ]
    inner = {number[node]: nodes.pop(number[node]) for node in blueprint.inside.nodes}
    for node in inner.values():
        node["inputs"] = [*_all_inputs(node, object_info[node["type"]])]
    inputs, outputs = _slots(blueprint.inside, number, inner, links, object_info)

    host = len(ui["nodes"]) + 1
    inner_links = [link for link in links if link[0] in inner and link[2] in inner]
    outer_links = [link for link in links if link[0] in nodes and link[2] in nodes]
    for index, slot in enumerate(inputs):
        inner_links += [(SUBGRAPH_INPUT, index, *target) for target in slot.targets]
        outer_links += [(*slot.source, host, slot.name)] if slot.source else []
    for index, slot in enumerate(outputs):
        inner_links.append((*slot.source, SUBGRAPH_OUTPUT, slot.name))
        outer_links += [(host, index, *target) for target in slot.targets]

    subgraph = _subgraph(blueprint, ui, inner, inner_links, inputs, outputs)
    nodes[host] = _host(blueprint, subgraph["id"], host, inputs, outputs)
    connected = _connect(nodes, outer_links)
    return {
        "last_node_id": host,
        "last_link_id": len(connected),
        "nodes": [*nodes.values()],
        "links": [[*link.values()] for link in connected],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }


def _all_inputs(node: dict, info: dict) -> Iterator[dict]:
    """The inputs of a node in the editor's order: first those that are no widgets."""
    yield from (slot for slot in node["inputs"] if "widget" not in slot)
    for name, (kind, *options) in {**info["input"]["required"],
                                   **info["input"].get("optional", {})}.items():
        if is_widget(kind, options[0] if options else {}):
            yield widget_slot(name, kind)


def _slots(
    inside: Workflow,
    number: dict[Node, int],
    nodes: dict[int, dict],
    links: Iterable[tuple],
    object_info: dict,
) -> tuple[list[Slot], list[Slot]]:
    """Inputs and outputs of a subgraph: links that cross its border, then the widgets that people
    set, those that name files last."""
    inputs, outputs = {}, {}
    for source, output, target, name in links:
        if source not in nodes and target in nodes:
            slot = inputs.setdefault(
                (source, output), Slot(name, _input(nodes[target], name)["type"], (source, output),
                                       [])
            )
            slot.targets.append((target, name))
        elif source in nodes and target not in nodes:
            given = nodes[source]["outputs"][output]
            slot = outputs.setdefault(
                (source, output),
                Slot(WORDS.get(given["name"], given["name"]), given["type"], (source, output), []),
            )
            slot.targets.append((target, name))
    files = (
        (node, widget)
        for node in inside.nodes
        for widget, value in node.inputs.items()
        if value in [file.name for file in node.files]
    )
    widgets = form(dict.fromkeys([*settings(inside.nodes), *files]))
    for name, places in widgets.items():
        targets = [(number[node], widget) for node, widget in places]
        node, widget = nodes[targets[0][0]], targets[0][1]
        value = widget_values(node, object_info[node["type"]])[widget]
        inputs[name] = Slot(name, _input(node, widget)["type"], None, targets, value)
    return [*inputs.values()], [outputs[source] for source in sorted(outputs)]


def _input(node: dict, name: str) -> dict:
    return next(slot for slot in node["inputs"] if slot["name"] == name)


def _connect(nodes: dict[int, dict], ends: Iterable[tuple]) -> list[dict]:
    """Replace the links of nodes. ends: (source, output, target, name of its input).

    Returns:
        list[dict]: The links, in the form of a subgraph; their values are the form of a workflow.
    """
    for node in nodes.values():
        for slot in node["inputs"]:
            slot["link"] = None
        for slot in node["outputs"]:
            slot["links"] = []
    links = []
    for link, (source, output, target, name) in enumerate(ends, start=1):
        slot = _input(nodes[target], name)
        slot["link"] = link
        nodes[source]["outputs"][output]["links"].append(link)
        links.append({
            "id": link,
            "origin_id": source,
            "origin_slot": output,
            "target_id": target,
            "target_slot": nodes[target]["inputs"].index(slot),
            "type": nodes[source]["outputs"][output]["type"],
        })
    return links


def _subgraph(
    blueprint: Blueprint,
    ui: dict,
    nodes: dict[int, dict],
    ends: list[tuple],
    inputs: list[Slot],
    outputs: list[Slot],
) -> dict:
    ports = {
        SUBGRAPH_INPUT: {"inputs": [], "outputs": [
            {"name": slot.name, "type": slot.type} for slot in inputs]},
        SUBGRAPH_OUTPUT: {"outputs": [], "inputs": [
            {"name": slot.name, "type": slot.type} for slot in outputs]},
    }
    links = _connect(nodes | ports, ends)
    members = [group for column in blueprint.inside.columns for group in column.values()]
    groups = [group for group, some in zip(ui["groups"], members) if some]
    left = min(node["pos"][0] for node in nodes.values())
    for position in (*(node["pos"] for node in nodes.values()),
                     *(group["bounding"] for group in groups)):
        position[0] -= left
    right = max(node["pos"][0] for node in nodes.values()) + WIDTH + 2 * MARGIN
    note = note_node(blueprint.inside)
    note["pos"][0] -= SLOTS_WIDTH + GAP
    note["title"] = "About this blueprint"
    name = blueprint.name
    return {
        "id": _uuid(name),
        "version": 1,
        "state": {
            "lastGroupId": len(ui["groups"]),
            "lastNodeId": ui["last_node_id"],
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "category": CATEGORY,
        "description": blueprint.description,
        "inputNode": {
            "id": SUBGRAPH_INPUT,
            "bounding": [-SLOTS_WIDTH - 2 * MARGIN, 0, SLOTS_WIDTH, 40 + 20 * len(inputs)],
        },
        "outputNode": {
            "id": SUBGRAPH_OUTPUT,
            "bounding": [right, 0, SLOTS_WIDTH, 40 + 20 * len(outputs)],
        },
        "inputs": [
            _exported(f"{name}/inputs", slot, port["links"])
            for slot, port in zip(inputs, ports[SUBGRAPH_INPUT]["outputs"])
        ],
        "outputs": [
            _exported(f"{name}/outputs", slot, [port["link"]])
            for slot, port in zip(outputs, ports[SUBGRAPH_OUTPUT]["inputs"])
        ],
        "widgets": [],
        "nodes": [note, *nodes.values()],
        "groups": groups,
        "links": links,
        "extra": {},
    }


def _exported(owner: str, slot: Slot, links: list[int]) -> dict:
    return {
        "id": _uuid(f"{owner}/{slot.name}"),
        "name": slot.name,
        "type": slot.type,
        "linkIds": links,
    }


def _host(
    blueprint: Blueprint, subgraph: str, number: int, inputs: list[Slot], outputs: list[Slot]
) -> dict:
    """The node that shows a subgraph."""
    widgets = [slot for slot in inputs if not slot.source]
    texts = [slot for slot in widgets if slot.targets[0][1] in TEXTS]
    height = (
        20 * max(len(inputs) - len(widgets), len(outputs))
        + 24 * len(widgets)
        + TEXT_HEIGHT * len(texts)
    )
    return {
        "id": number,
        "type": subgraph,
        "pos": [0, 0],
        "size": [HOST_WIDTH, height],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [
            {"name": slot.name, "type": slot.type}
            | ({} if slot.source else {"widget": {"name": slot.name}})
            for slot in inputs
        ],
        "outputs": [{"name": slot.name, "type": slot.type} for slot in outputs],
        "properties": {"cnr_id": "featherweight", "ver": OWN_VERSION},
        "widgets_values": [slot.value for slot in widgets],
        "title": blueprint.name,
    }


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/subgraphs/{name}"))
