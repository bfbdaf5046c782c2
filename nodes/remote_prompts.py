"""Looks at each prompt before the host validates it.

A prompt may run on other machines, where model files may exist that are missing here.
"""
from ..loaders.paths.folders import FILES_MAY_BE_REMOTE
from .comfyui_server import log_lack, running_server
from .file_inputs import PROMPT

RUN_ON_RAY = "FeatherweightRunOnRay"


def watch_prompts():
    """Registers `on_prompt` with the host's server, if it runs."""
    server = running_server()
    try:
        if server is not None:
            server.add_on_prompt_handler(on_prompt)
    except AttributeError as error:
        log_lack(str(error), "Run on Ray needs the model files on this machine too")


def on_prompt(request: dict) -> dict:
    """Notes a prompt, and whether it has a Run on Ray node; returns the request unchanged.

    The host calls this in the task in which it then validates the inputs of the prompt's nodes.
    """
    graph = request.get("prompt")
    PROMPT.set(graph)
    nodes = graph.values() if isinstance(graph, dict) else ()
    FILES_MAY_BE_REMOTE.set(
        any(isinstance(node, dict) and node.get("class_type") == RUN_ON_RAY for node in nodes)
    )
    return request
