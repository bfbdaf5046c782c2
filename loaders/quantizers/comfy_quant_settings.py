"""What the settings in a layer's `comfy_quant` mean for the values of its weight.

| a setting | what follows |
|---|---|
| is read by its format (`ComfyUIFormat.settings`) | another value than it takes stops the load |
| has no meaning for values (`MEANINGLESS`) | nothing |
| changes values (`CHANGING`) | it stops the load, unless it is off or a part undoes it |
| is none of these | it is named, and the file loads |

Sources: ComfyUI 0.33 `comfy/ops.py`, comfy-kitchen 0.2.40 `tensor/*.py`, convert_to_quant
`utils/comfy_quant.py`, comfy-quants `docs/formats`, molbal/ComfyUI-GGUF `tools/convert.py`.
"""
import re
from collections.abc import Collection, Iterator
from typing import Any

from ..container.weight_file import safe_repr
from ..refusals.read_anyway import READ_ANYWAY, reads_anyway
from .comfy_quant_formats import NESTED, OFF, Settings, known_format
from .parts import PartError

# settings that say nothing about values -> who writes them, and what they say
MEANINGLESS = {
    r"orig_\w+": "convert_to_quant, molbal: the dtype and shape before",
    r"full_precision_matrix_mult": "ComfyUI: whether its own product quantizes inputs",
    r"linear_dtype": "ComfyUI: what its own product quantizes inputs to",
    r"num_experts": "ComfyUI: the layers in a bank, which its reader compares",
    r"quant_group_size|group_size|block_size": "kitchen, convert_to_quant: beside scales of rows",
    r"scale_dtype": "convert_to_quant: of its scales, which have a dtype",
    r"artifact_contract|projection_\w+": "comfy-quants: which model and layer it was made for",
    r"backing": "molbal: which of its kernels multiplied",
}

# what a setting is called that changes values, what it says, and parts of a layer that undo it
CHANGING: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"(^|_|conv|qua)rot(at\w+)?(_|$|groupsize)|hadamard|spin_?quant", "rotated", ()),
    (r"permut|(^|_)perm(_|$)|reorder|act_?order", "in another order", ()),
    (r"smooth", "smoothed", ("smooth_factor", "weight_smooth_factor", "pre_quant_scale")),
    (r"shift|zero_point|unsigned", "shifted", ()),
    (r"codebook|(^|_)(table|lut)(_|$)", "numbers of a table", ("weight_codebook",)),
    (r"low_?rank|(^|_)svd", "without their low rank", ("proj_down", "weight_proj_down")),
    (r"transpos", "transposed", ()),
)


def check_settings(settings: Settings, parts: Collection[str]):
    """Raises PartError where settings say what the values of a weight are not read as.

    Args:
        settings: of a layer's `comfy_quant`; of a format that is not read here nothing is checked.
        parts: the last parts of the names of the layer's tensors.
    """
    known = known_format(settings)
    if known is None or reads_anyway():
        return
    for name, value in _entries(settings):
        values = known.settings.get(name)
        what = None if name in known.settings else _changed(name, value, parts)
        if what or (values is not None and value not in values):
            because = f", so its values are {what}" if what else ""
            raise PartError(
                f"its comfy_quant has {safe_repr(name)}: {safe_repr(value)}{because}, which is not"
                " read", f"Get another conversion. {READ_ANYWAY}")


def unknown_settings(settings: Settings) -> Iterator[str]:
    """Yields the names of settings of which nobody here knows what they mean."""
    known = known_format(settings)
    for name, _ in _entries(settings) if known else ():
        if known and name not in known.settings and not any(
                re.fullmatch(pattern, name) for pattern in MEANINGLESS) and not any(
                re.search(pattern, name.lower()) for pattern, _, _ in CHANGING):
            yield name


def _entries(settings: Settings) -> Iterator[tuple[str, Any]]:
    nested = settings.get(NESTED)
    yield from ((nested if isinstance(nested, dict) else {}) | dict(settings)).items()


def _changed(name: str, value: Any, parts: Collection[str]) -> str | None:
    """Returns what a setting of `CHANGING` makes of values, None where it makes nothing of them."""
    is_off = value.lower() in OFF if isinstance(value, str) else not value
    if is_off or any(re.fullmatch(pattern, name) for pattern in MEANINGLESS):
        return None
    return next((what for pattern, what, undone_by in CHANGING
                 if re.search(pattern, name.lower()) and not any(
                     part in parts for part in undone_by)), None)
