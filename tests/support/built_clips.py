"""What ComfyUI builds of text encoders with each type: its class and tokenizer, without weights."""
import types
from collections.abc import Sequence

import comfy.sd
import pytest
import torch

HOST_NAMES = {"UMT5_XXL": "T5_XXL", "UMT5_BASE": "T5_BASE"}  # of families that the host has as one


def built_clip(families: Sequence[str | None], clip_type: str) -> tuple:
    """Returns the class and the tokenizer that the host makes a CLIP of; equal ones are the same.

    Args:
        families: of the files, keys of `encoder_sets.TITLES`; None for one without an encoder.
        clip_type: the `type` of the loader.
    """
    built = []
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd, "CLIP", lambda target, **_: built.append(target))
        patch.setattr(comfy.sd, "detect_te_model", _family)
        comfy.sd.load_text_encoder_state_dicts(
            [{f"family {family}": torch.zeros(1)} for family in families], clip_type=host_type)
    target, = built
    return _described(target.clip), _described(target.tokenizer)


def _family(weights: dict):
    name = next(iter(weights)).removeprefix("family ")
    return None if name == "None" else comfy.sd.TEModel[HOST_NAMES.get(name, name)]


def _described(made) -> str:
    """Names a class or function and what it was made with."""
    names = [f"{made.__module__}.{made.__qualname__}"]
    function = made if isinstance(made, types.FunctionType) else vars(made).get("__init__")
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        if value is not made:
            names.append(_described(value) if isinstance(value, type) else repr(value))
    return " ".join(names)
