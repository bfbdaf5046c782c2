"""The owner's way to load files that are refused since 0.2.3, as 0.2.2 loaded them."""
import os

VARIABLE = "FEATHERWEIGHT_READ_ANYWAY"
READ_ANYWAY = f"{VARIABLE}=1 in the environment of ComfyUI loads it as version 0.2.2 did."


def reads_anyway() -> bool:
    """Returns whether the owner of this ComfyUI wants such files loaded."""
    return os.environ.get(VARIABLE) == "1"
