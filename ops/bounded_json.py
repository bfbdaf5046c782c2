"""JSON that others wrote, read only where its values take a bounded multiple of its bytes."""
import json
from typing import Any

# An empty list or dict takes 60 bytes of memory and two of a text. The descriptions of tensors, of
# all that is written as JSON here the densest, have three in 50 bytes.
BYTES_EACH, SPARE = 16, 1000


def read_json(text: bytes | str, **options) -> Any:
    """What a JSON text says. options: those of `json.loads`. Raises ValueError for what is none, or
    too nested or dense."""
    lists, dicts = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if (text.count(lists) + text.count(dicts)) * BYTES_EACH > len(text) + SPARE:
        raise ValueError("it has more lists and objects than any description of a model")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("its lists and objects lie too deep in each other") from None
