"""The host's server, and the sentence for what this host lacks."""
import functools
import logging
import sys

log = logging.getLogger(__name__)


def running_server():
    """Return the host's `PromptServer`, or None where none runs, as in a script: importing it would
    start half of one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


@functools.cache  # a node asks each time it runs
def log_lack(problem: str, consequence: str):
    """Log once what goes without something of the host's. problem: Python's sentence, which has the
    name."""
    log.error(
        "[Featherweight] This ComfyUI lacks what this version of Featherweight relies on (%s). So"
        " %s. Update both, with the packages in their requirements.txt.",
        problem,
        consequence,
    )
