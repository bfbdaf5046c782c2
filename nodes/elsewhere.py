"""Prompts that run on other machines: model files that are not here may be there."""
import logging
import sys

from ..loaders.folders import MAY_BE_ELSEWHERE

log = logging.getLogger(__name__)

RUN_ON_RAY = "FeatherweightRunOnRay"


def watch_prompts():
    """Have each prompt looked at before the host judges it. Where there is no server, as in a script, nothing is done."""
    if "server" not in sys.modules:  # importing it starts half of a server
        return
    try:
        from server import PromptServer
        PromptServer.instance.add_on_prompt_handler(noted)
    except (ImportError, AttributeError):
        log.debug("[Featherweight] There is no server to ask about prompts.", exc_info=True)


def noted(request: dict) -> dict:
    """The request as it is. The host calls this in the task in which it then asks the prompt's nodes about their inputs."""
    graph = request.get("prompt")
    nodes = graph.values() if isinstance(graph, dict) else ()
    MAY_BE_ELSEWHERE.set(any(isinstance(node, dict) and node.get("class_type") == RUN_ON_RAY for node in nodes))
    return request
