"""What differs from item to item of *Run on Ray*: seeds count up, and each item has a line of text.
Standard library only."""
from collections.abc import Mapping, Sequence

from .graph import GraphError, is_link, texts, upstream

SEEDS = ("seed", "noise_seed")
TEXTS = ("text", "prompt", "text_g", "text_l", "clip_l", "t5xxl")
MARK = "%text%"
LARGEST_SEED = 1 << 64


def make_variants(part: Mapping[str, dict], count: int,
                  prompts: str = "") -> list[dict[str, object]]:
    """For each item its changes to a graph, {"7.seed": 6, "4.text": "a red house"}.

    Args:
        prompts: a line for each item, begun again when they run out; empty lines do not count.

    Raises:
        GraphError: the lines have no place to go.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    seeds, places = seed_places(part), text_places(part) if lines else {}
    return [{place: (value + index) % LARGEST_SEED for place, value in seeds.items()} | {
        place: value.replace(MARK, lines[index % len(lines)])
        if MARK in value else lines[index % len(lines)] for place, value in places.items()
    } for index in range(count)]


def seed_places(part: Mapping[str, dict]) -> dict[str, int]:
    """Place -> seed of the first item. A seed that comes from a node with one whole number is that
    number."""
    found = {}
    for node, spec in part.items():
        for name in SEEDS:
            value, place = spec["inputs"].get(name), f"{node}.{name}"
            if is_link(value):
                source = value[0]
                numbers = {
                    key: number for key, number in part[source]["inputs"].items()
                    if type(number) is int
                }
                if len(numbers) != 1:
                    continue
                (key, value), = numbers.items()
                place = f"{source}.{key}"
            if type(value) is int:
                found[place] = value
    return found


def text_places(part: Mapping[str, dict]) -> dict[str, str]:
    """Place -> text, of the inputs that a line goes to: those with %text% in them, else all texts
    of the one node that writes the prompt, and not the negative one. Raises GraphError."""
    marked = {place: value for place, value in texts(part).items() if MARK in value}
    if marked:
        return marked
    positive, negative = (
        _ancestors(part, "positive", "negative"),
        _ancestors(part, "negative", "positive"),
    )
    prompts = {
        place: value for place, value in texts(part).items()
        if place.partition(".")[2] in TEXTS and place.partition(".")[0] not in negative - positive
    }
    nodes = {place.partition(".")[0] for place in prompts}
    if len(nodes) != 1:
        raise GraphError(
            f"Run on Ray has lines of text, and {len(nodes) or 'no'} nodes before it have a"
            f" prompt: write {MARK} into the text that a line is to go to.")
    return prompts


def _ancestors(part: Mapping[str, dict], name: str, other: str) -> set[str]:
    """The nodes whose outputs reach an input of that name, and not only by way of one of the other
    name."""
    without = {
        node: {**spec, "inputs": {**spec["inputs"], other: None}} for node, spec in part.items()
    }
    links = [spec["inputs"].get(name) for spec in part.values()]
    return {node for link in links if is_link(link) for node in upstream(without, link)}


def nodes_affected(part: Mapping[str, dict], changes: Sequence[Mapping[str, object]]) -> set[str]:
    """The nodes that run anew for each item: those changed and all behind them. Every node, where
    nothing differs."""
    found = {place.partition(".")[0] for change in changes for place in change}
    if len(changes) < 2 or not found:
        return set(part)
    grown = True
    while grown:
        behind = {node for node, spec in part.items()
                  if any(is_link(value) and value[0] in found for value in spec["inputs"].values())}
        grown = not behind <= found
        found |= behind
    return found
