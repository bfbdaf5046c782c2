"""Applies a checked LoRA to a model and its text encoder, as patches of the host."""
import collections
from collections.abc import Callable

from .model_blocks import is_text_key, weight_key
from .report import LoraReport


def apply_lora(model, clip, report: LoraReport, strength_model: float, strength_clip: float,
               factor: Callable[[str], float] = lambda key: 1.0):
    """Applies the matching layers of a LoRA by the host's own `add_patches`.

    Args:
        model: patcher of the diffusion model.
        clip: CLIP of the text encoder, or None.
        report: of the LoRA on these two.
        strength_model, strength_clip: of the layers of each.
        factor: key of a weight -> factor on its strength; 0 leaves the layer out.

    Returns:
        (model, clip), which are clones.
    """
    groups = collections.defaultdict(dict)
    for target, value in report.patches.items():
        key = weight_key(target)
        groups[factor(key), is_text_key(key)][target] = value
    model = model.clone()
    clip = None if clip is None else clip.clone()
    for (share, is_text), patches in groups.items():
        strength = share * (strength_clip if is_text else strength_model)
        patched = clip if is_text else model
        if strength and patched is not None:
            patched.add_patches(patches, strength)
    if report.metadata:
        for patcher in (model, None if clip is None else clip.patcher):
            if patcher is not None:
                patcher.set_attachments("lora_metadata", report.metadata)
    return model, clip
