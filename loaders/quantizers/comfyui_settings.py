"""What the settings in a layer's `comfy_quant` mean for the values of its weight.

| a setting | what follows |
|---|---|
| is read by the reader of the format (`READ`) | another value than the reader uses stops the load |
| has no meaning for values (`MEANINGLESS`) | nothing |
| changes values (`CHANGING`) | it stops the load, unless it is off or a part undoes it |
| is none of these | it is named, and the file loads |

Sources: ComfyUI 0.33 `comfy/ops.py`, comfy-kitchen 0.2.40 `tensor/*.py`, convert_to_quant
`utils/comfy_quant.py`, comfy-quants `docs/formats`, molbal/ComfyUI-GGUF `tools/convert.py`.
"""
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ..container.weight_file import safe_repr
from ..read_anyway import READ_ANYWAY, reads_anyway
from .parts import PartError

Accepts = Callable[[Any], bool]

FORMAT, NESTED = "format", "params"  # old writers nest settings in `params`
CONVROT, ROTATION_SIZE = "convrot", "convrot_groupsize"
# of convrot_w4a4: what ComfyUI rounds inputs to, "int8" or "int4", which it is without
LINEAR_DTYPE = "linear_dtype"
OFF = (None, False, 0, "", "none", "off", "false", "no")


def _any(value: Any) -> bool:
    return True


def _is_one_of(*values: Any) -> Accepts:
    return lambda value: value in values


_NAMES = {FORMAT: _any, NESTED: _any, "per_row": _any}
# readers turn values back where `convrot` says so, and check the number of columns
_MAY_BE_ROTATED = _NAMES | {CONVROT: _any, ROTATION_SIZE: _any, "weight_rotated": _any}
_IS_ROTATED = _MAY_BE_ROTATED | dict.fromkeys((CONVROT, "weight_rotated"), _is_one_of(True, 1))
_IN_GROUPS = _NAMES | {"group_size": _any, "block_size": _any}  # which the reader compares
_LEVELS = _IS_ROTATED | {"group_size": _any, "bits": _any, "symmetric": _any}


def _groups_of(count: int) -> dict[str, Accepts]:
    return dict.fromkeys(("group_size", "block_size"), _is_one_of(count, *OFF))


# format -> the settings that its reader uses, and which values it takes
READ: dict[str, dict[str, Accepts]] = {
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "int8_tensorwise"),
                    _MAY_BE_ROTATED),
    **dict.fromkeys(("mxfp8", "hybrid_mxfp8"), _MAY_BE_ROTATED | _groups_of(32)),
    "nvfp4": _MAY_BE_ROTATED | _groups_of(16),
    **dict.fromkeys(("float8_e4m3fn_blockwise", "float8_e4m3fn_block3d", "int8_blockwise"),
                    _IN_GROUPS),
    "convrot_w4a4": _IS_ROTATED,
    "asym_w4a8_int8": _LEVELS, "w6a8_int8": _LEVELS,
    "awq_w4a16": _IN_GROUPS,
    "svdquant_w4a4": _NAMES | _groups_of(64) | {
        "layout": _is_one_of("kitchen_tile_packed_w4a4", "natural", *OFF), "act_unsigned": _any,
        "lowrank_branch_input_basis": _any, "proj_down_smooth_folded": _any},
}
# formats of which some have no setting for it
ROTATED = ("convrot_w4a4", "asym_w4a8_int8", "w6a8_int8")

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


def setting(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a setting, `default` where there is none."""
    nested = settings.get(NESTED)
    return settings.get(name, nested.get(name, default) if isinstance(nested, dict) else default)


def is_rotated(format_name: str, settings: Mapping[str, Any]) -> bool:
    """Returns whether the columns of a weight are rotated in groups."""
    return format_name in ROTATED or bool(setting(settings, CONVROT, False))


def check_settings(format_name: str, settings: Mapping[str, Any], parts: Collection[str]):
    """Raises PartError where settings say what the values of a weight are not read as.

    Args:
        format_name: that the settings name; of one that is not read here nothing is checked.
        settings: of a layer's `comfy_quant`.
        parts: the last parts of the names of the layer's tensors.
    """
    if format_name not in READ or reads_anyway():
        return
    for name, value in _entries(settings):
        accepts = READ[format_name].get(name)
        what = None if accepts else _changed(name, value, parts)
        if what or (accepts and not accepts(value)):
            because = f", so its values are {what}" if what else ""
            raise PartError(
                f"its comfy_quant has {safe_repr(name)}: {safe_repr(value)}{because}, which is not"
                " read", f"Get another conversion. {READ_ANYWAY}")


def unknown_settings(format_name: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of settings of which nobody here knows what they mean."""
    for name, _ in _entries(settings) if format_name in READ else ():
        if name not in READ[format_name] and not any(
                re.fullmatch(pattern, name) for pattern in MEANINGLESS) and not any(
                re.search(pattern, name.lower()) for pattern, _, _ in CHANGING):
            yield name


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
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
