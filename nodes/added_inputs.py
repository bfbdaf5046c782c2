"""Inputs that a later version added, which mean what they meant in workflows that lack them.

The host takes the default of a node's function where a prompt lacks one, and the editor
(`web/added_inputs.js`) the value `EARLIER` where a saved workflow does; new nodes have the default.
An input that replaced another has its id as `REPLACED`, by which the editor gives it the connection
that a saved workflow has there.
"""
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

EARLIER, REPLACED = "value_in_earlier_workflows", "replaced_input"  # in an input's description


def added_combo(name: str, options: Sequence[str], earlier: str, **settings: Any):
    """Returns an optional input with a choice.

    Args:
        name: id of the input.
        options: of the choice.
        earlier: the option that workflows without the input mean.
        settings: further ones of the host's class.
    """
    extra = {EARLIER: earlier, **settings.pop("extra_dict", {})}
    return io.Combo.Input(name, options=list(options), optional=True, extra_dict=extra, **settings)
