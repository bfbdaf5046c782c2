"""Turns a workflow as the editor saves it (UI format, version 0.4) into what the server runs (API
format)."""
from dataclasses import dataclass

WIDGET_TYPES = {"INT", "FLOAT", "FLOAT,INT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
NOTES = {"Note", "MarkdownNote"}
AFTER_GENERATE = {"fixed", "increment", "decrement", "randomize"}
# The parts of a subgraph that stand for its inputs and its outputs, by their ids.
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


def is_widget(input_type, options: dict) -> bool:
    """Whether the editor has a widget for an input of a node, by the server's description."""
    has_values = isinstance(input_type, list) or (
        options.get("widgetType", input_type) in WIDGET_TYPES)
    return has_values and not options.get("forceInput")


def has_control(name: str, options: dict) -> bool:
    """Whether the editor adds a widget that changes the value after each run, as to all seeds."""
    return options.get("control_after_generate", name in ("seed", "noise_seed"))


def to_api(workflow: dict, object_info: dict) -> dict:
    """API-format prompt of a UI-format workflow; muted nodes are left out. Nodes in a subgraph have
    the editor's ids, such as 12:3.

    Raises ValueError for a node the server does not have, or one that this converter cannot follow.
    """
    subgraphs = {
        subgraph["id"]: subgraph
        for subgraph in workflow.get("definitions", {}).get("subgraphs", [])
    }
    links = {link: (source, output) for link, source, output, *_ in workflow["links"]}
    return _Graph(_by_id(workflow), links, subgraphs).prompt(object_info)


@dataclass
class _Graph:
    """nodes: by id. links: id -> (source node, its output). node, parent: of a subgraph, the node
    that shows it and the graph of that. outputs: the links that a subgraph gives."""

    nodes: dict[int, dict]
    links: dict[int, tuple[int, int]]
    subgraphs: dict[str, dict]
    prefix: str = ""
    node: dict | None = None
    parent: "_Graph | None" = None
    outputs: tuple[int, ...] = ()

    def prompt(self, object_info: dict) -> dict:
        prompt = {}
        for node in self.nodes.values():
            if node["type"] in NOTES or node["type"] == "Reroute" or node.get("mode") == 2:
                continue
            if node["type"] in self.subgraphs:
                prompt |= self.inner(node).prompt(object_info)
                continue
            if node["type"] not in object_info:
                raise ValueError(f"The server has no node {node['type']}.")
            if node.get("mode") == 4:
                raise ValueError(
                    f"Node {node['id']} ({node['type']}) is bypassed, which is not supported here."
                )
            inputs = widget_values(node, object_info[node["type"]])
            for slot in node.get("inputs", []):
                if slot.get("link") is not None:
                    source = self.source(slot["link"])
                    inputs |= {} if source is None else {slot["name"]: source}
            prompt[f"{self.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
        return prompt

    def inner(self, node: dict) -> "_Graph":
        """The subgraph that a node of this graph shows."""
        subgraph = self.subgraphs[node["type"]]
        links = {
            link["id"]: (link["origin_id"], link["origin_slot"]) for link in subgraph["links"]
        }
        outputs = tuple(slot["linkIds"][0] for slot in subgraph["outputs"])
        prefix = f"{self.prefix}{node['id']}:"
        return _Graph(_by_id(subgraph), links, self.subgraphs, prefix, node, self, outputs)

    def source(self, link: int):
        """What a link brings: [id, output] of a node, or the value of a widget of the node that
        shows this subgraph. None: nothing is linked there."""
        source, output = self.links[link]
        if source == SUBGRAPH_INPUT:
            assert self.node and self.parent
            slot = self.node["inputs"][output]
            if slot["link"] is not None:
                return self.parent.source(slot["link"])
            widgets = [slot for slot in self.node["inputs"] if "widget" in slot]
            return self.node["widgets_values"][widgets.index(slot)] if "widget" in slot else None
        node = self.nodes[source]
        if node["type"] == "Reroute":
            return self.source(node["inputs"][0]["link"])
        if node["type"] in self.subgraphs:
            inner = self.inner(node)
            return inner.source(inner.outputs[output])
        return [f"{self.prefix}{source}", output]


def _by_id(graph: dict) -> dict[int, dict]:
    return {node["id"]: node for node in graph["nodes"]}


def widget_values(node: dict, info: dict) -> dict:
    """Input name -> value; the editor saves values by position, in schema order."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    values, result = list(values), {}
    for section in ("required", "optional"):
        for name, spec in info["input"].get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not is_widget(kind, options):
                continue
            if not values and options.get("image_upload"):  # the editor takes the first there is
                values = list(kind if isinstance(kind, list) else options["options"])[:1]
            if not values:
                continue
            result[name] = values.pop(0)
            # The editor adds a widget of its own after a seed, and one after a picture.
            if has_control(name, options) and values and values[0] in AFTER_GENERATE:
                values.pop(0)
            if options.get("image_upload") and values[:1] == ["image"]:
                values.pop(0)
    return result
