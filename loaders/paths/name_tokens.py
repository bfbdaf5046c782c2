"""Fills in what a file name says between percent signs, as the editor does for ComfyUI's own nodes.

| in a name | becomes |
|---|---|
| `%date:yyyy-MM-dd%` | the date and time of the run; d, M, h, m and s, alone or twice, yy or yyyy |
| `%KSampler.seed%` | the value of an input, by the node's title or its class |
| `%model%` | the name of the model's file, without its ending |

The rest is the host's, such as `%year%`. The editor fills in what it can when it queues a workflow:
then a node of that title is found in subgraphs too.
"""
import datetime
import re
from collections.abc import Mapping
from typing import Any

TOKEN = re.compile(r"%([^%]+)%")
DATE_PARTS = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyyy|yy")
NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
VALUES = (str, int, float, bool)  # of inputs that are no links


def fill_in(name: str, model: str, prompt: Mapping[str, Any] | None = None) -> str:
    """Returns a name with the values of its tokens, in which nothing separates folders.

    Args:
        name: of a file, with folders, as a workflow has it.
        model: what `%model%` becomes.
        prompt: the nodes that are run, as the host hands them to a node; None where it does not.
    """
    now = datetime.datetime.now()

    def value(token: re.Match) -> str:
        text = token[1]
        if text.startswith("date:"):
            return _safe(_date(text.removeprefix("date:"), now))
        if text == "model":
            return _safe(model)
        found = _input(text, prompt or {})
        return token[0] if found is None else _safe(str(found))

    return TOKEN.sub(value, name)


def _date(text: str, now: datetime.datetime) -> str:
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}
    return DATE_PARTS.sub(lambda part: str(now.year)[-len(part[0]):] if part[0][0] == "y" else str(
        parts[part[0][0]]).zfill(len(part[0])), text)


def _input(text: str, prompt: Mapping[str, Any]) -> Any:
    """Returns the value of `node.input`, None where no node has it."""
    title, dot, name = text.partition(".")
    nodes = [node for node in prompt.values() if isinstance(node, dict)] if dot else []
    for named in (lambda node: node.get("class_type"),
                  lambda node: (node.get("_meta") or {}).get("title")):
        for node in nodes:
            inputs = node.get("inputs")
            if named(node) == title and isinstance(inputs, dict) and isinstance(
                    inputs.get(name), VALUES):
                return inputs[name]
    return None


def _safe(text: str) -> str:
    return NOT_IN_NAMES.sub("_", text)
