"""Prompts that run on other machines: model files that are not here may be there."""
from ..loaders.folders import FILES_MAY_BE_REMOTE
from .host_server import log_lack, running_server

RUN_ON_RAY = "FeatherweightRunOnRay"


def watch_prompts():
    """Have each prompt looked at before the host judges it. Where there is no server, as in a
    script, nothing is done."""
    server = running_server()
    try:
        if server is not None:
            server.add_on_prompt_handler(on_prompt)
    except AttributeError as error:
        log_lack(str(error), "Run on Ray needs the model files on this machine too")


def on_prompt(request: dict) -> dict:
    """The request as it is. The host calls this in the task in which it then asks the prompt's
    nodes about their inputs."""
    graph = request.get("prompt")
    nodes = graph.values() if isinstance(graph, dict) else ()
    FILES_MAY_BE_REMOTE.set(
        any(isinstance(node, dict) and node.get("class_type") == RUN_ON_RAY for node in nodes)
    )
    return request
