"""Blocks of a model, told by the names of its weights."""
import re
from collections.abc import Iterable

MODEL_PREFIX = "diffusion_model."
# Kinds of blocks whose kind alone says where in the model they stand.
BLOCK_LIST = re.compile(r"(blocks?|layers?|refiner)$")


def block_of(key: str) -> str:
    """The block a weight of the host's model belongs to: `double_blocks.3`, `img_in`, `clip_l`."""
    name = key.removeprefix(MODEL_PREFIX)
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    # The middle of a UNet is one block of a few parts.
    if (
        name == key
        or not number.isdigit()
        or not BLOCK_LIST.search(first)
        or first == "middle_block"
    ):
        return first
    return f"{first}.{number}"


def is_text(key: str) -> bool:
    """Whether a weight is one of a text encoder."""
    return not key.startswith(MODEL_PREFIX)


def key_of(target) -> str:
    """Key of the weight a patch is for; the host names some targets as (key, slice of the
    weight)."""
    return target if isinstance(target, str) else target[0]


def weight_keys(model, clip=None) -> list[str]:
    """Names of all weights that a LoRA could change, as the host's patches name them."""
    modules = [model.model] if clip is None else [model.model, clip.cond_stage_model]
    return [key for module in modules for key, _ in module.named_parameters()]


def block_numbers(keys: Iterable[str]) -> dict[str, list[int]]:
    """Kind of block among the weights of these names -> the numbers of its blocks, sorted; none for
    a kind without numbers."""
    groups = {}
    for block in map(block_of, keys):
        kind, _, number = block.partition(".")
        numbers = groups.setdefault(kind, set())
        if number:
            numbers.add(int(number))
    return {kind: sorted(numbers) for kind, numbers in groups.items()}


def described_blocks(keys: Iterable[str]) -> str:
    """The blocks of a model in a line: `double_blocks.0-18, single_blocks.0-37, img_in, clip_l`."""
    groups = block_numbers(keys)
    return ", ".join(
        name if not numbers else f"{name}.{min(numbers)}-{max(numbers)}" if len(numbers) >
        1 else f"{name}.{numbers[0]}" for name, numbers in groups.items())
