"""Options that have other words than in earlier versions.

Workflows and prompts that were saved with the old words run with the same meaning: the host accepts
them, `current` gives today's, and the editor (`web/saved_values.js`) shows today's.
"""
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from .file_inputs import Options

RENAMED = "renamed_options"  # key in the description of an input: old word -> today's


def renamed_combo(name: str, options: Sequence[str], renamed: Mapping[str, str], **settings: Any):
    """Returns an input with a choice, some options of which were renamed.

    Args:
        name: id of the input.
        options: today's.
        renamed: old word -> today's.
        settings: further ones of the host's class.
    """
    accepted = Options(options, lambda value: isinstance(value, str) and value in renamed)
    return io.Combo.Input(name, options=accepted, extra_dict={RENAMED: dict(renamed)}, **settings)


def current(value: Any, renamed: Mapping[str, str]) -> Any:
    """Returns today's word for an option."""
    return renamed.get(value, value) if isinstance(value, str) else value
