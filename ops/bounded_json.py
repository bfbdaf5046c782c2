"""Reads untrusted JSON only where its values take a bounded multiple of the text's size."""
import json
from typing import Any

# An empty list or dict takes 60 bytes of memory and two bytes of text. The densest JSON read here,
# descriptions of tensors, has three of them in 50 bytes.
BYTES_EACH, SPARE = 16, 1000


def read_json(text: bytes | str, **options) -> Any:
    """Parses a JSON text.

    Args:
        text: UTF-8 bytes or a string.
        options: those of `json.loads`.

    Raises:
        ValueError: the text is not valid JSON, nested too deep, or has too many lists and objects.
    """
    if isinstance(text, bytes):
        openings = text.count(b"[") + text.count(b"{")
    else:
        openings = text.count("[") + text.count("{")
    if openings * BYTES_EACH > len(text) + SPARE:
        raise ValueError("it has more lists and objects than any description of a model")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None
