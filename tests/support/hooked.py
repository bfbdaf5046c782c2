"""A LoRA as a hook, on a model of `families`."""
import comfy.hooks
import torch
from families import inputs, run


def run_hooked(patcher, family, lora: dict, strength: float) -> list[torch.Tensor]:
    """Runs a model before a hook applies its LoRA, while it does, and after it."""
    clone = patcher.clone()
    hooks = comfy.hooks.create_hook_lora(lora, strength, 0.0)
    clone.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    outputs = [run(clone, family)]
    clone.patch_hooks(hooks)
    try:
        outputs.append(run_loaded(clone, family))
    finally:
        clone.patch_hooks(None)
    return [*outputs, run_loaded(clone, family)]


def run_loaded(patcher, family) -> torch.Tensor:
    """Runs a model without loading it, which would take the hook away."""
    arguments = inputs(family)
    with torch.inference_mode():
        return patcher.model.apply_model(**arguments) - arguments["x"]
