"""A checked LoRA onto a model and its text encoder, as patches of the host."""
import collections
from collections.abc import Callable

from .model_blocks import is_text, key_of
from .report import LoraReport


def apply_lora(model, clip, report: LoraReport, strength_model: float, strength_clip: float,
               factor: Callable[[str], float] = lambda key: 1.0):
    """(model, clip) with the fitting layers added by the host's own `add_patches`, on clones.

    factor: key of a weight -> what its strength is multiplied by; 0 leaves the layer out.
    """
    groups = collections.defaultdict(dict)
    for target, value in report.patches.items():
        groups[factor(key_of(target)), is_text(key_of(target))][target] = value
    model, clip = model.clone(), None if clip is None else clip.clone()
    for (share, text), patches in groups.items():
        patched, strength = (clip, strength_clip) if text else (model, strength_model)
        if share * strength:
            patched.add_patches(patches, share * strength)
    if report.metadata:
        for patcher in (model, clip.patcher if clip is not None else None):
            if patcher is not None:
                patcher.set_attachments("lora_metadata", report.metadata)
    return model, clip
