"""Reads, changes and compares workflows in API format. Standard library only.

A workflow is {"4": {"class_type": "CLIPTextEncode", "inputs": {"text": "...", "clip": ["2", 0]}},
...}. The path of an input is "4.text"; a link is [node, output].
"""
import hashlib
import json
from collections.abc import Mapping

# the class of the node that `with_result` adds; `cluster/embedded_comfyui.py` defines it
RESULT_NODE = "FeatherweightResult"


class GraphError(ValueError):
    """A workflow or a row of changes to it is wrong, and would fail on every machine."""


def read(text: str, name: str = "The workflow") -> dict[str, dict]:
    """Parses a workflow.

    Args:
        text: of a file in API format, or of what is posted to a server.
        name: what messages call it.

    Raises:
        GraphError
    """
    try:
        graph = json.loads(text)
    except ValueError as error:
        raise GraphError(f"{name} is not valid JSON: {error}.") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise GraphError(
            f"{name} is in the editor's format. Export it in API format: in ComfyUI's menu, File >"
            " Export (API)."
        )
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict):  # posted to a server
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
            f"{name} is not in API format, which has a class_type and inputs for each node. Export"
            " it: in ComfyUI's menu, File > Export (API).")
    return graph


def apply_changes(graph: Mapping[str, dict], changes: Mapping[str, object]) -> dict[str, dict]:
    """Returns a copy of a graph with changed inputs; unchanged nodes are shared.

    Args:
        changes: input path -> value, {"4.text": "a red house"}.

    Raises:
        GraphError
    """
    changed = dict(graph)
    for path, value in changes.items():
        node, dot, name = path.partition(".")
        if not dot or not name:
            raise GraphError(
                f"{path!r} is not an input of the workflow: write node, dot, input, such as"
                " \"4.text\".")
        if node not in graph:
            raise GraphError(f"The workflow has no node {node}, which {path!r} names.")
        inputs = changed[node]["inputs"]
        if name not in inputs:
            raise GraphError(
                f"Node {node} ({graph[node]['class_type']}) has no input {name!r}, only"
                f" {', '.join(inputs) or 'none'}.")
        if is_link(inputs[name]) and not is_link(value):
            raise GraphError(
                f"{path!r} comes from another node, {inputs[name][0]}: change that one's input.")
        changed[node] = {**changed[node], "inputs": {**inputs, name: value}}
    return changed


def one_line(value: object, limit: int = 1000) -> str:
    """Returns an exception or a text on one line, of at most `limit` characters."""
    return " ".join(str(value).split())[:limit]


def is_link(value: object) -> bool:
    """Returns whether an input's value is another node's output."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) is int
    )


def upstream(graph, link: list) -> dict[str, dict]:
    """Returns the nodes that a link depends on.

    Args:
        graph: a mapping, or ComfyUI's DynamicPrompt.
        link: [node, output].

    Raises:
        GraphError
    """
    def node_of(name: str) -> dict:
        try:
            return graph.get_node(name) if hasattr(graph, "get_node") else graph[name]
        except KeyError:
            raise GraphError(
                f"The workflow has no node {one_line(name, 100)}, though another is connected to"
                " it.") from None

    nodes, pending = {}, [link[0]]
    while pending:
        name = pending.pop()
        if name not in nodes:
            node = node_of(name)
            nodes[name] = {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
            pending += [value[0] for value in node["inputs"].values() if is_link(value)]
    return nodes


def with_result(graph: Mapping[str, dict], link: list) -> tuple[dict[str, dict], str]:
    """Returns a graph with a node that saves a link's images as they are, and that node's name."""
    name = "result"
    while name in graph:
        name += "0"
    return {**graph, name: {"class_type": RESULT_NODE, "inputs": {"images": list(link)}}}, name


def digest(graph: Mapping[str, dict]) -> str:
    """Returns the sha256 (hex) of what a graph computes, without titles, positions and order."""
    nodes = {name: [node["class_type"], node["inputs"]] for name, node in graph.items()}
    return hashlib.sha256(canonical(nodes).encode()).hexdigest()


def canonical(value: object) -> str:
    """Returns JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def classes(graph: Mapping[str, dict]) -> set[str]:
    """Returns the classes of a graph's nodes."""
    return {node["class_type"] for node in graph.values()}


def texts(graph: Mapping[str, dict]) -> dict[str, str]:
    """Returns input path -> text of every input that is a text, names of files included."""
    return {
        f"{name}.{key}": value for name, node in graph.items()
        for key, value in node["inputs"].items() if isinstance(value, str)
    }
