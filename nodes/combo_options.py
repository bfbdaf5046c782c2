"""The choices that the host's own nodes offer, whichever way they are written in."""
import comfy.sd

import nodes as host_nodes


def combo_options(node: type, name: str) -> list[str]:
    """The choices of one input of a node; none where it has no such input, or one without choices.

    A newer node has a schema of inputs with their `options`. An older one has them in the place of
    the input's type, `(["a", "b"], {...})`, or as the newer ones are shown to older code,
    `("COMBO", {"options": ["a", "b"]})`.
    """
    if hasattr(node, "GET_SCHEMA"):
        offered = next(
            (
                getattr(input, "options", None)
                for input in node.GET_SCHEMA().inputs
                if input.id == name
            ),
            None,
        )
    else:
        sections = node.INPUT_TYPES()
        kind, *options = (sections.get("required", {}) | sections.get("optional", {})).get(
            name, (None,)
        )
        offered = (
            kind
            if isinstance(kind, (list, tuple))
            else options[0].get("options")
            if options
            else None
        )
    # one that brings inputs of its own has a key
    return [getattr(choice, "key", choice) for choice in offered or []]


def encoder_types(*node_ids: str) -> list[str]:
    """The types that the host's own loaders of text encoders offer, in their order; all it knows
    where one offers none."""
    offered = [
        combo_options(host_nodes.NODE_CLASS_MAPPINGS[node_id], "type")
        if node_id in host_nodes.NODE_CLASS_MAPPINGS
        else []
        for node_id in node_ids
    ]
    if not all(offered):
        offered.append([clip_type.name.lower() for clip_type in comfy.sd.CLIPType])
    return list(dict.fromkeys(name for names in offered for name in names))
