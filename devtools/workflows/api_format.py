"""Turns a workflow as the editor saves it (UI format, version 0.4) into what the server runs (API
format)."""

WIDGET_TYPES = {"INT", "FLOAT", "FLOAT,INT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
NOTES = {"Note", "MarkdownNote"}
AFTER_GENERATE = {"fixed", "increment", "decrement", "randomize"}


def to_api(workflow: dict, object_info: dict) -> dict:
    """API-format prompt of a UI-format workflow without subgraphs; muted nodes are left out.

    Raises ValueError for a node the server does not have, or one that this converter cannot follow.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    # id -> (source node, its output)
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for node in nodes.values():
        if node["type"] in NOTES or node["type"] == "Reroute" or node.get("mode") == 2:
            continue
        if node["type"] not in object_info:
            raise ValueError(f"The server has no node {node['type']}.")
        if node.get("mode") == 4:
            raise ValueError(
                f"Node {node['id']} ({node['type']}) is bypassed, which is not supported here."
            )
        inputs = _widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                source, output = _source(slot["link"], links, nodes)
                inputs[slot["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widget_values(node: dict, info: dict) -> dict:
    """Input name -> value; the editor saves values by position, in schema order."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    values, result = list(values), {}
    for section in ("required", "optional"):
        for name, spec in info["input"].get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if (
                not (isinstance(kind, list) or kind in WIDGET_TYPES)
                or options.get("forceInput")
                or not values
            ):
                continue
            result[name] = values.pop(0)
            # The editor adds a widget of its own after a seed, and one after a picture.
            if options.get("control_after_generate") and values and values[0] in AFTER_GENERATE:
                values.pop(0)
            if options.get("image_upload") and values[:1] == ["image"]:
                values.pop(0)
    return result


def _source(link: int, links: dict, nodes: dict) -> tuple[int, int]:
    source, output = links[link]
    while nodes[source]["type"] == "Reroute":
        source, output = links[nodes[source]["inputs"][0]["link"]]
    return source, output
