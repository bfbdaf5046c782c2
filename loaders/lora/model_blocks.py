"""Finds the blocks of a model by the names of its weights."""
import re
from collections.abc import Iterable

MODEL_PREFIX = "diffusion_model."
# what trainers and libraries put before the name of a weight
WRAPPERS = re.compile(
    r"^((lora|lycoris|loha|lokr|glora|b?oft|dora|prior|base_model|model|diffusion_model|unet|dit"
    r"|te\d?|text_encoders?(_\d)?|text_model|cond_stage_model|language_model"
    r"|transformer(?![._]blocks))[._]+)+")
# names of the module lists that hold numbered blocks
BLOCK_LIST = re.compile(r"(blocks?|layers?|refiner)$")


def block_name(key: str) -> str:
    """Returns the block of a weight of the host's: `double_blocks.3`, `img_in`, `clip_l`."""
    name = key.removeprefix(MODEL_PREFIX)
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    # The middle block of a UNet is a list of its parts.
    if (
        name == key
        or not number.isdigit()
        or not BLOCK_LIST.search(first)
        or first == "middle_block"
    ):
        return first
    return f"{first}.{number}"


def is_text_key(key: str) -> bool:
    """Returns whether a weight belongs to a text encoder."""
    return not key.startswith(MODEL_PREFIX)


def weight_key(target) -> str:
    """Returns the key of a patch's weight; the host has some targets as (key, slice)."""
    return target if isinstance(target, str) else target[0]


def weight_keys(model, clip=None) -> list[str]:
    """Returns the names of all weights that a LoRA could change, as in the host's patches."""
    modules = [model.model] if clip is None else [model.model, clip.cond_stage_model]
    return [key for module in modules for key, _ in module.named_parameters()]


def block_numbers(keys: Iterable[str]) -> dict[str, list[int]]:
    """Returns group of blocks -> sorted numbers of its blocks; [] for a block without a number."""
    groups = {}
    for block in map(block_name, keys):
        group, _, number = block.partition(".")
        numbers = groups.setdefault(group, set())
        if number:
            numbers.add(int(number))
    return {group: sorted(numbers) for group, numbers in groups.items()}


def describe_blocks(keys: Iterable[str]) -> str:
    """Returns a model's blocks: `double_blocks.0-18, single_blocks.0-37, img_in, clip_l`."""
    texts = []
    for group, numbers in block_numbers(keys).items():
        if len(numbers) > 1:
            texts.append(f"{group}.{numbers[0]}-{numbers[-1]}")
        else:
            texts.append(f"{group}.{numbers[0]}" if numbers else group)
    return ", ".join(texts)
