"""The host's server, and the log line about what a host lacks."""
import functools
import sys

from ..ops.log import log


def running_server():
    """Returns the host's `PromptServer`, or None where none runs, as in a script.

    The module is looked up and not imported: importing it would start half a server.
    """
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


@functools.cache  # nodes call it at each run
def log_lack(problem: str, consequence: str):
    """Logs once that this host lacks something.

    Args:
        problem: Python's error text, which contains the missing name.
        consequence: a clause that says what does not work.
    """
    log.error(
        "This ComfyUI lacks what this version of Featherweight relies on (%s). So"
        " %s. Update both, with the packages in their requirements.txt.",
        problem,
        consequence,
    )
