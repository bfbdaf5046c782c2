"""Says on the node that runs that a LoRA does not fit the model, or makes its layers run in float.

ComfyUI's own LoRA loader, and those of other packs, leave this to the log.
"""
from collections.abc import Mapping

from comfy.weight_adapter import WeightAdapterBase

from ..loaders.lora.model_blocks import MODEL_PREFIX, weight_key
from ..ops.log import log
from ..ops.patcher import PackedPatcher
from ..ops.patcher.float_products import float_layers_text
from ..ops.patches.adapters import shape_mismatch
from .node_text import show_text

ADVICE = "Check LoRA (Featherweight) says what it is made for."


def show_unused_patches(patcher: PackedPatcher, patches: Mapping):
    """Shows on the node that runs which of the patches do not fit a diffusion model, and which
    keep layers from ComfyUI's kernels."""
    unused = unused_patches_text(patcher, patches)
    if unused is not None:
        log.warning("%s", unused)
    texts = [text for text in (unused, float_layers_text(patcher)) if text is not None]
    if texts:
        show_text("\n".join(texts))


def unused_patches_text(patcher: PackedPatcher, patches: Mapping) -> str | None:
    """Returns a sentence about patches that do not fit a diffusion model, None where all fit.

    Args:
        patcher: of any model; the text is None if it is not a diffusion model.
        patches: target -> value, as in the host's `add_patches`. The host gives a model those of a
            text encoder too.
    """
    shapes = {name: weight.shape for name, weight in patcher.model.named_parameters()}
    if not any(name.startswith(MODEL_PREFIX) for name in shapes):
        return None
    if not patches:
        return ("ComfyUI finds no layer of this LoRA in the model, so the model is not changed."
                f" {ADVICE}")
    adapters = {target: value for target, value in patches.items()
                if isinstance(value, WeightAdapterBase) and weight_key(target) in shapes}
    reasons = {}
    for target, value in adapters.items():
        key, offset = weight_key(target), None if isinstance(target, str) else target[1]
        reason = shape_mismatch(value, shapes[key], offset)
        if reason is not None:
            reasons[key] = reason
    if not reasons:
        return None
    key, reason = next(iter(reasons.items()))
    return (f"{len(reasons)} of the {len(adapters)} layers of this LoRA do not fit the model and"
            f" are left out, such as {key}: {reason}. {ADVICE}")
