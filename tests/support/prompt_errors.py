"""What the host answers to a prompt before anything runs."""
import asyncio
import contextvars

import execution
import pytest
from pack_nodes import node_list

import nodes as host_nodes
from featherweight.nodes.remote_prompts import on_prompt

NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}


class Give:
    """Gives whatever a link asks for."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", ""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


class Show:
    """An output node, because the host looks at nothing that leads to none."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}


LINK = ["give", 0]


def prompt_errors(node_id: str, inputs: dict) -> list[dict]:
    """Returns the host's errors about one node with these inputs."""
    return errors_by_node({"node": {"class_type": node_id, "inputs": inputs}}).get("node", [])


def errors_by_node(graph: dict) -> dict[str, list[dict]]:
    """Returns the host's errors about each node of a prompt, to which `Give` is added as "give" and
    a `Show` for each node.
    """
    shows = {f"show {name}": {"class_type": "Show", "inputs": {"value": [name, 0]}}
             for name in graph}
    prompt = {**graph, "give": {"class_type": "Give", "inputs": {}}, **shows}

    def queue():
        on_prompt({"prompt": prompt})
        return asyncio.run(execution.validate_prompt("prompt", prompt, None))

    with pytest.MonkeyPatch.context() as patch:
        for name, node in (*NODES.items(), ("Give", Give), ("Show", Show)):
            patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
        *_, errors = contextvars.copy_context().run(queue)
    return {name: entry["errors"] for name, entry in errors.items()}


def input_errors(node_id: str, **inputs) -> dict[str, str]:
    """Returns the host's message at each of these inputs of a node that it refuses.

    None stands for a link, whose value is not known yet.
    """
    values = {name: LINK if value is None else value for name, value in inputs.items()}
    errors = [(error["extra_info"]["input_name"], error["details"])
              for error in prompt_errors(node_id, values)]
    messages = {name: details for name, details in errors if name in inputs}
    assert len(messages) == len([name for name, _ in errors if name in inputs])
    return messages
