"""Featherweight: quantised diffusion models in ComfyUI, weights kept packed in memory."""
import sys
from pathlib import Path

from .ops.host_versions import (
    HOST_VERSION,
    OLDEST_HOST,
    is_older,
    is_untested,
    tested_range,
    where_to_update,
)
from .ops.log import log

WEB_DIRECTORY = "./nodes/web"
# the name in sys.modules of the copy of this pack whose nodes ComfyUI uses
IN_USE = "_featherweight_in_use"


def _obstacle() -> str | None:
    """Returns why ComfyUI gets no nodes from this copy, as a message, or None."""
    if is_older(HOST_VERSION, OLDEST_HOST):
        return (
            f"This is ComfyUI {HOST_VERSION} and Featherweight needs {OLDEST_HOST} or newer:"
            " update ComfyUI. Until then none of its nodes are available.")
    other = sys.modules.get(IN_USE)
    if other is not None and other.__name__ != __name__:
        used, unused = Path(other.__file__ or "").parent, Path(__file__).parent
        return (
            f"Featherweight is installed twice: the nodes of {used} are in use, so remove the other"
            f" folder, {unused}.")
    return None


_message = _obstacle()
if _message:
    log.error("%s", _message)
    NODE_CLASS_MAPPINGS = {}  # ComfyUI then does not call comfy_entrypoint
elif is_untested(HOST_VERSION):
    log.info("This is ComfyUI %s. %s. If something fails here: %s",
                 HOST_VERSION, tested_range(), where_to_update())


async def comfy_entrypoint():
    """Returns the extension that ComfyUI takes the nodes from. Raises ImportError."""
    try:
        from .nodes import FeatherweightExtension
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"ComfyUI {HOST_VERSION} lacks what all nodes of Featherweight need ({error}). Update"
            " both, with the packages in their requirements.txt.") from error
    sys.modules[IN_USE] = sys.modules[__name__]
    return FeatherweightExtension()
