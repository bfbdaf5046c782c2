"""Workflows in API format: {"4": {"class_type": "CLIPTextEncode", "inputs": {"text": "...", "clip":
["2", 0]}}, ...}

A place in one is "4.text", a link [node, output]. Standard library only.
"""
import hashlib
import json
from collections.abc import Mapping

# the class of the node that `with_result` adds; `cluster/embedded_comfyui.py` has it
RESULT_NODE = "FeatherweightResult"


class GraphError(ValueError):
    """What is wrong with a workflow or with a row of changes to it, in one sentence: it fails alike
    on every machine."""


def read(text: str, name: str = "The workflow") -> dict[str, dict]:
    """A workflow from the text of a file in API format. Raises GraphError."""
    try:
        graph = json.loads(text)
    except ValueError as error:
        raise GraphError(f"{name} is no JSON: {error}.") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise GraphError(
            f"{name} is in the editor's format. Export it in API format: in ComfyUI's menu, File >"
            " Export (API)."
        )
    # what is posted to a server
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict):
        graph = graph["prompt"]
    if not (
        isinstance(graph, dict)
        and graph
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), dict)
            for node in graph.values()
        )
    ):
        raise GraphError(
            f"{name} is no workflow in API format, which has a class_type and inputs for each"
            f" node. In ComfyUI's menu: File > Export (API).")
    return graph


def apply_changes(graph: Mapping[str, dict], changes: Mapping[str, object]) -> dict[str, dict]:
    """A copy of a graph with {"4.text": ...} put into it; what is not changed is shared. Raises
    GraphError."""
    found = dict(graph)
    for place, value in changes.items():
        node, dot, name = place.partition(".")
        if not dot or not name:
            raise GraphError(
                f"{place!r} is no place in the workflow; \"4.text\" is one: node, dot, input.")
        if node not in graph:
            raise GraphError(f"The workflow has no node {node}, which {place!r} names.")
        inputs = found[node]["inputs"]
        if name not in inputs:
            raise GraphError(
                f"Node {node} ({graph[node]['class_type']}) has no input {name!r}, only"
                f" {', '.join(inputs) or 'none'}.")
        if is_link(inputs[name]) and not is_link(value):
            raise GraphError(
                f"{place!r} comes from another node, {inputs[name][0]}: change that one's input.")
        found[node] = {**found[node], "inputs": {**inputs, name: value}}
    return found


def one_line(said, most: int = 1000) -> str:
    """An exception or a text as part of one sentence, at most so many characters."""
    return " ".join(str(said).split())[:most]


def is_link(value) -> bool:
    """Whether an input's value is another node's output."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) is int
    )


def upstream(graph, link: list) -> dict[str, dict]:
    """What is before a link [node, output]. graph: a mapping, or the host's DynamicPrompt. Raises
    GraphError."""
    def node_of(name: str) -> dict:
        try:
            return graph.get_node(name) if hasattr(graph, "get_node") else graph[name]
        except KeyError:
            raise GraphError(
                f"The workflow has no node {name}, though another is connected to it.") from None

    found, waiting = {}, [link[0]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            node = node_of(name)
            found[name] = {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
            waiting += [value[0] for value in node["inputs"].values() if is_link(value)]
    return found


def with_result(graph: Mapping[str, dict], link: list) -> dict[str, dict]:
    """A graph that hands the pictures of a link over as a tensor: `PromptResult.images` of
    `cluster/embedded_comfyui.py`."""
    name = "result"
    while name in graph:
        name += "_"
    return {**graph, name: {"class_type": RESULT_NODE, "inputs": {"images": list(link), "key": ""}}}


def digest(graph: Mapping[str, dict]) -> str:
    """sha256 (hex) of what a graph computes: titles, positions and order do not count."""
    meant = {name: [node["class_type"], node["inputs"]] for name, node in graph.items()}
    return hashlib.sha256(canonical(meant).encode()).hexdigest()


def canonical(value) -> str:
    """JSON that is alike for alike values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def classes(graph: Mapping[str, dict]) -> set[str]:
    """The classes of nodes that a graph names."""
    return {node["class_type"] for node in graph.values()}


def texts(graph: Mapping[str, dict]) -> dict[str, str]:
    """Place -> text, of every input that is one: names of files are among them."""
    return {
        f"{name}.{key}": value for name, node in graph.items()
        for key, value in node["inputs"].items() if isinstance(value, str)
    }
