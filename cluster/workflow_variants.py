"""Makes the variants of *Run on Ray*: seeds count up, and each item has a line of text.

Standard library only.
"""
from collections.abc import Mapping

from .workflow_graph import GraphError, is_link, texts, upstream

SEED_INPUTS = ("seed", "noise_seed")
TEXT_INPUTS = ("text", "prompt", "text_g", "text_l", "clip_l", "t5xxl")
PLACEHOLDER = "%text%"
SEED_COUNT = 1 << 64
SEED_LENGTH = len(str(SEED_COUNT))
MAX_TEXT = 10_000_000  # characters of the changes of all items together


def make_variants(part: Mapping[str, dict], count: int,
                  prompts: str = "") -> list[dict[str, object]]:
    """Returns for each item its changes to a graph, {"7.seed": 6, "4.text": "a red house"}.

    Args:
        part: the graph.
        count: how many items there are.
        prompts: a line for each item, repeated from the first when they run out; empty lines do
            not count.

    Raises:
        GraphError: the graph has no text that the lines could go to, or several; or the
            changes would be longer than `MAX_TEXT`.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    seeds = seed_inputs(part)
    prompt_texts = prompt_inputs(part) if lines else {}
    length = count * sum(len(path) + SEED_LENGTH for path in seeds)
    for path, text in prompt_texts.items():
        marks = text.count(PLACEHOLDER)
        length += sum(len(path) + (len(text) if marks else 0)
                      + (marks or 1) * len(lines[index % len(lines)]) for index in range(count))
    if length > MAX_TEXT:
        raise GraphError(f"Run on Ray would send texts of {length / 1e6:.0f} million characters,"
                         f" expected at most {MAX_TEXT // 10**6} million. Use shorter lines, or"
                         f" {PLACEHOLDER} less often.")
    variants = []
    for index in range(count):
        changes: dict[str, object] = {
            path: (seed + index) % SEED_COUNT for path, seed in seeds.items()
        }
        for path, text in prompt_texts.items():
            line = lines[index % len(lines)]
            changes[path] = text.replace(PLACEHOLDER, line) if PLACEHOLDER in text else line
        variants.append(changes)
    return variants


def seed_inputs(part: Mapping[str, dict]) -> dict[str, int]:
    """Returns input path -> seed of the first item.

    A seed that comes from a node with one whole number is that number.
    """
    seeds = {}
    for node, spec in part.items():
        for name in SEED_INPUTS:
            value = spec["inputs"].get(name)
            path = f"{node}.{name}"
            if is_link(value):
                source = value[0]
                numbers = {
                    key: number for key, number in part[source]["inputs"].items()
                    if type(number) is int
                }
                if len(numbers) != 1:
                    continue
                (key, value), = numbers.items()
                path = f"{source}.{key}"
            if type(value) is int:
                seeds[path] = value
    return seeds


def prompt_inputs(part: Mapping[str, dict]) -> dict[str, str]:
    """Returns input path -> text of the inputs that a line goes to.

    Those are the texts with %text% in them, else all texts of the one node that has the prompt,
    which is not the node of the negative prompt alone.

    Raises:
        GraphError: no node has a prompt, or several have.
    """
    marked = {path: text for path, text in texts(part).items() if PLACEHOLDER in text}
    if marked:
        return marked
    positive = _ancestors(part, "positive", "negative")
    negative = _ancestors(part, "negative", "positive")
    prompts = {
        path: text for path, text in texts(part).items()
        if path.partition(".")[2] in TEXT_INPUTS and _node_of(path) not in negative - positive
    }
    nodes = {_node_of(path) for path in prompts}
    if len(nodes) != 1:
        raise GraphError(
            f"Run on Ray has lines of text, and {len(nodes) or 'no'} nodes before it have a"
            f" prompt: write {PLACEHOLDER} into the text that a line is to go to.")
    return prompts


def _node_of(path: str) -> str:
    return path.partition(".")[0]


def _ancestors(part: Mapping[str, dict], name: str, other: str) -> set[str]:
    """Returns the nodes that an input called `name` depends on, not only through one of `other`."""
    without = {
        node: {**spec, "inputs": {**spec["inputs"], other: None}} for node, spec in part.items()
    }
    links = [spec["inputs"].get(name) for spec in part.values()]
    return {node for link in links if is_link(link) for node in upstream(without, link)}
