"""Parses rules that give each block of a model its factor on a LoRA's strength.

A rule is `name=factor`. Commas or newlines separate rules, a later rule wins, and `#` begins a
comment. A name is `all`, `text`, a group of blocks (`double`, `input`), some of its blocks
(`double.0-9`, `single.20`, `IN04`, `OUT03-05`, `MID`), or the name of a layer inside the blocks
(`img_attn`, `attn2`, `ff.net`). `preset:NAME` inserts the rules of a preset.
"""
import math
import re
from collections.abc import Callable, Iterable

from ..container.weight_file import safe_repr
from .model_blocks import MODEL_PREFIX, block_name, block_numbers, describe_blocks, is_text_key

# names of a UNet's blocks in the block-weight extensions
UNET_NAME = re.compile(r"(IN|M|MID|OUT)([0-9]{0,9}(?:-[0-9]{1,9})?)", re.IGNORECASE)
UNET_GROUPS = {"in": "input", "out": "output", "m": "middle", "mid": "middle"}

# Presets are rules themselves. Those of UNets are from sd-webui-lora-block-weight, where BASE means
# the text encoder. `style` and `subject` of SDXL are the two blocks of B-LoRA (Frenkel et al.
# 2024), `layout` is InstantStyle's.
ANY_MODEL = {"no-text": "text=0", "text-only": "all=0, text=1"}
THIRDS = ("first-third", "middle-third", "last-third")
UNET = {
    "INALL": "all=0, text=1, input=1", "MIDALL": "all=0, text=1, middle=1",
    "OUTALL": "all=0, text=1, output=1",
}
UNET_SD = {
    "INS": "all=0, text=1, IN01-02=1", "IND": "all=0, text=1, IN05-08=1",
    "MIDD": "all=0, text=1, IN05-08=1, MID=1, OUT03-06=1",
    "OUTD": "all=0, text=1, OUT03-06=1", "OUTS": "all=0, text=1, OUT07-11=1",
}
UNET_XL = {
    "style": "all=0, OUT01=1", "subject": "all=0, OUT00=1", "layout": "all=0, IN08=1",
}
STREAMS = {"double-only": "all=0, text=1, double=1", "single-only": "all=0, text=1, single=1"}


def presets(keys: Iterable[str]) -> dict[str, str]:
    """Returns name -> rules of the presets for a model's blocks."""
    groups = block_numbers(keys)
    available = ANY_MODEL | {name: _third(groups, index) for index, name in enumerate(THIRDS)}
    if "input_blocks" in groups:
        available |= UNET | (UNET_XL if len(groups["input_blocks"]) == 9 else UNET_SD)
    if {"double_blocks", "single_blocks"} <= groups.keys():
        available |= STREAMS
    return available


def parse_block_weights(text: str, keys: Iterable[str]) -> Callable[[str], float]:
    """Parses rules into a function: key of a weight -> factor on the LoRA's strength.

    The factor is 1.0 if no rule matches.

    Args:
        text: the rules.
        keys: of all weights that a LoRA could change, with the host's names.

    Raises:
        ValueError: if a rule is invalid or matches nothing.
    """
    keys = list(keys)
    rules = []
    _parse_rules(text, keys, rules)

    def factor(key: str) -> float:
        return next((value for matches, value in reversed(rules) if matches(key)), 1.0)

    return factor


def _parse_rules(text: str, keys: list[str], rules: list[tuple[Callable[[str], bool], float]]):
    """Appends (matches(key), factor) of each rule to `rules`."""
    available = presets(keys)
    for rule in re.split(r"[,;\n]", re.sub(r"#[^\n]*", "", text)):
        rule = rule.strip()
        if not rule:
            continue
        if rule.lower().startswith("preset:"):
            name = rule[len("preset:"):].strip()
            preset_rules = next((preset_rules for preset, preset_rules in available.items()
                                 if preset.lower() == name.lower()), None)
            if preset_rules is None:
                raise ValueError(
                    f"Block weights: this model has no preset {safe_repr(name)}; it has"
                    f" {', '.join(available)}.")
            _parse_rules(preset_rules, keys, rules)
            continue
        name, equals, value = (part.strip() for part in rule.partition("="))
        factor = _parse_number(value)
        if not equals or not name or factor is None:
            raise ValueError(
                f"The block weight {safe_repr(rule)} is not a rule such as double=0.5 or"
                " single.0-9=0.")
        matches = _matcher(name)
        if name not in ("all", "text") and not any(map(matches, keys)):
            raise ValueError(
                f"The block weight {safe_repr(rule)} names nothing in this model. Its blocks are"
                f" {describe_blocks(keys)}; the name of a layer inside them, such as"
                f" {_layer_example(keys)}, works too.")
        rules.append((matches, factor))


def _parse_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _matcher(name: str) -> Callable[[str], bool]:
    """Returns a function that tells whether the name of a rule matches a key."""
    if name == "all":
        return lambda key: True
    if name == "text":
        return is_text_key
    unet = UNET_NAME.fullmatch(name)
    if unet:
        group, numbers = UNET_GROUPS[unet[1].lower()], unet[2]
        name = group if group == "middle" or not numbers else f"{group}.{numbers}"
    selection = re.fullmatch(r"(.+)\.([0-9]{1,9})(?:-([0-9]{1,9}))?", name)
    group = selection[1] if selection else name
    first = int(selection[2]) if selection else 0
    last = int(selection[3] or selection[2]) if selection else math.inf

    def matches(key: str) -> bool:
        key_group, _, number = block_name(key).partition(".")
        if key_group == group or key_group.startswith(group + "_"):
            return not selection or (number.isdigit() and first <= int(number) <= last)
        # the name of a layer: whole parts of the key
        return not is_text_key(key) and f".{name}." in f"{key}."

    return matches


def _third(groups: dict[str, list[int]], index: int) -> str:
    """Returns rules for the first, middle or last third of each group of blocks."""
    rules = ["all=0"]
    for group, numbers in groups.items():
        start, end = (len(numbers) * part // 3 for part in (index, index + 1))
        if start < end:
            rules.append(f"{group}.{numbers[start]}-{numbers[end - 1]}=1")
    return ", ".join(rules)


def _layer_example(keys: list[str]) -> str:
    """Returns the name of a layer inside a block of the model, for a message."""
    for key in keys:
        block = block_name(key)
        if "." in block:
            return key.removeprefix(f"{MODEL_PREFIX}{block}.").split(".")[0]
    return keys[0].split(".")[-2] if keys and "." in keys[0] else "attn"
