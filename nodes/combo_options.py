"""The options that the host's own nodes offer, in either way of defining a node."""
import comfy.sd

import nodes as host_nodes


def host_node(node_id: str) -> type:
    """Returns the class of a node of the host's or of another pack."""
    return host_nodes.NODE_CLASS_MAPPINGS[node_id]


def combo_options(node: type, name: str) -> list[str]:
    """Returns the options of one input of a node; none if it has no such input or no options.

    A newer node has a schema of inputs with their `options`. An older one has them in place of the
    input's type, `(["a", "b"], {...})`, or as newer nodes are shown to older code,
    `("COMBO", {"options": ["a", "b"]})`.
    """
    if hasattr(node, "GET_SCHEMA"):
        inputs = (input for input in node.GET_SCHEMA().inputs if input.id == name)
        options = getattr(next(inputs, None), "options", None)
    else:
        sections = node.INPUT_TYPES()
        inputs = sections.get("required", {}) | sections.get("optional", {})
        input_type, *settings = inputs.get(name, (None,))
        if isinstance(input_type, (list, tuple)):
            options = input_type
        else:
            options = settings[0].get("options") if settings else None
    # an option that brings inputs of its own has a key
    return [getattr(option, "key", option) for option in options or []]


def encoder_types(*node_ids: str) -> list[str]:
    """Returns the types that the host's text encoder loaders offer, in their order.

    If one of them offers none, all types that the host knows are added.
    """
    offered = [
        combo_options(host_node(node_id), "type")
        if node_id in host_nodes.NODE_CLASS_MAPPINGS
        else []
        for node_id in node_ids
    ]
    if not all(offered):
        offered.append([clip_type.name.lower() for clip_type in comfy.sd.CLIPType])
    return list(dict.fromkeys(name for names in offered for name in names))
