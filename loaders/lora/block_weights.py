"""Rules that give each block of a model its share of a LoRA's strength.

A rule is `name=factor`; rules are separated by commas or lines, a later one wins, `#` begins a
comment. A name is `all`, `text`, a kind of block (`double`, `input`), some of its blocks
(`double.0-9`, `single.20`, `IN04`, `OUT03-05`, `MID`), or the name of a layer inside the blocks
(`img_attn`, `attn2`, `ff.net`). `preset:NAME` stands for rules of its own.
"""
import math
import re
from collections.abc import Callable, Iterable

from ..files.container import safe_repr
from .model_blocks import MODEL_PREFIX, block_numbers, block_of, described_blocks, is_text

# A rule of the block-weight extensions' naming, for the blocks of a UNet.
UNET_NAME = re.compile(r"(IN|M|MID|OUT)([0-9]{0,9}(?:-[0-9]{1,9})?)", re.IGNORECASE)
UNET_GROUPS = {"in": "input", "out": "output", "m": "middle", "mid": "middle"}

# Presets are rules themselves. Those of UNets are the ones of sd-webui-lora-block-weight, whose
# BASE is the text encoder. `style` and `subject` of SDXL are the two blocks of B-LoRA (Frenkel et
# al. 2024), `layout` is InstantStyle's.
ANY_MODEL = {"no-text": "text=0", "text-only": "all=0, text=1"}
THIRDS = ("first-third", "middle-third", "last-third")
UNET = {
    "INALL": "all=0, text=1, input=1", "MIDALL": "all=0, text=1, middle=1",
    "OUTALL": "all=0, text=1, output=1"
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
    """Name -> rules of the presets that this model has the blocks for."""
    groups = block_numbers(keys)
    found = ANY_MODEL | {name: _third(groups, index) for index, name in enumerate(THIRDS)}
    if "input_blocks" in groups:
        found |= UNET | (UNET_XL if len(groups["input_blocks"]) == 9 else UNET_SD)
    if {"double_blocks", "single_blocks"} <= groups.keys():
        found |= STREAMS
    return found


def parse_block_weights(text: str, keys: Iterable[str]) -> Callable[[str], float]:
    """Turn rules into a function: key of a weight -> factor on the LoRA's strength; 1.0 where no
    rule says anything.

    keys: of all weights a LoRA could change, as the host names them. Raises ValueError naming the
    rule and what there is.
    """
    keys = list(keys)
    rules = []
    _read(text, keys, rules)

    def factor(key: str) -> float:
        return next((value for matches, value in reversed(rules) if matches(key)), 1.0)

    return factor


def _read(text: str, keys: list[str], rules: list):
    known = presets(keys)
    for rule in re.split(r"[,;\n]", re.sub(r"#[^\n]*", "", text)):
        rule = rule.strip()
        if not rule:
            continue
        if rule.lower().startswith("preset:"):
            name = rule[len("preset:"):].strip()
            found = next(
                (rules_of for preset, rules_of in known.items() if preset.lower() == name.lower()),
                None)
            if found is None:
                raise ValueError(
                    f"Block weights: this model has no preset {safe_repr(name)}; it has"
                    f" {', '.join(known)}."
                )
            _read(found, keys, rules)
            continue
        name, equals, value = (part.strip() for part in rule.partition("="))
        factor = _number(value)
        if not equals or not name or factor is None:
            raise ValueError(
                f"The block weight {safe_repr(rule)} is not a rule such as double=0.5 or"
                " single.0-9=0."
            )
        matches = _matcher(name)
        if name not in ("all", "text") and not any(map(matches, keys)):
            raise ValueError(
                f"The block weight {safe_repr(rule)} names nothing in this model. Its blocks are"
                f" {described_blocks(keys)}; the name of a layer inside them, such as"
                f" {_layer_example(keys)}, works too.")
        rules.append((matches, factor))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _matcher(name: str) -> Callable[[str], bool]:
    """Whether a key is meant by the name of a rule."""
    if name == "all":
        return lambda key: True
    if name == "text":
        return is_text
    unet = UNET_NAME.fullmatch(name)
    if unet:
        group, numbers = UNET_GROUPS[unet[1].lower()], unet[2]
        name = group if group == "middle" or not numbers else f"{group}.{numbers}"
    some = re.fullmatch(r"(.+)\.([0-9]{1,9})(?:-([0-9]{1,9}))?", name)
    group, first, last = (
        (some[1], int(some[2]), int(some[3] or some[2])) if some else (name, 0, math.inf)
    )

    def matches(key: str) -> bool:
        kind, _, number = block_of(key).partition(".")
        if kind == group or kind.startswith(group + "_"):
            return not some or (number.isdigit() and first <= int(number) <= last)
        # A layer's name: whole parts of the key, inside a block.
        return not is_text(key) and f".{name}." in f"{key}."

    return matches


def _third(groups: dict[str, list[int]], index: int) -> str:
    """Rules for the first, middle or last third of each kind of block."""
    rules = ["all=0"]
    for kind, numbers in groups.items():
        start, end = (len(numbers) * part // 3 for part in (index, index + 1))
        if start < end:
            rules.append(f"{kind}.{numbers[start]}-{numbers[end - 1]}=1")
    return ", ".join(rules)


def _layer_example(keys: list[str]) -> str:
    inside = (key.removeprefix(MODEL_PREFIX + block_of(key) + ".").split(".")[0] for key in keys
              if "." in block_of(key))
    return next(inside, keys[0].split(".")[-2] if keys and "." in keys[0] else "attn")
