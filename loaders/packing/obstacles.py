"""What is on a MODEL or CLIP that no file of weights can hold: refused where the weights would be others, else named."""

ADVICE = "Take it off, or put it behind the loader of the new file instead."


class SaveError(ValueError):
    """A model that cannot be saved as asked. The message says what is in the way and what to do."""


def refuse_obstacles(patcher):
    """Raise SaveError for what changes weights while the model runs and would be lost without a word."""
    if patcher.injections:
        raise SaveError(f"The model has {_listed(patcher.injections)} put into it while it runs, as a bypass LoRA"
                        " is, which no file can hold. Load the LoRA with Load LoRA or Apply LoRA (Featherweight) instead.")
    if patcher.hook_patches or patcher.forced_hooks or patcher.hook_backup:
        raise SaveError("The model has LoRA hooks, whose strength follows a schedule; a file holds one strength. Load the LoRA"
                        " with Load LoRA or Apply LoRA (Featherweight) instead.")
    if patcher.weight_wrapper_patches:
        raise SaveError(f"Functions of another node change the weights {_listed(patcher.weight_wrapper_patches)} while the"
                        f" model runs, which no file can hold. {ADVICE}")
    replaced = [name for name, value in patcher.object_patches.items()
                if name.startswith("diffusion_model") and (hasattr(value, "forward") or hasattr(value, "shape"))]
    if replaced:
        raise SaveError(f"Another node has put parts of its own in the place of {_listed(replaced)}, which no file can hold."
                        f" {ADVICE}")


def not_saved(patcher) -> list[str]:
    """Names of what else is on a model, and does not change its weights: a file of weights has no place for it."""
    options = patcher.model_options
    found = [*patcher.object_patches]
    found += [name for name, value in options.items() if name != "transformer_options" and value]
    for name, value in options.get("transformer_options", {}).items():
        found += [f"{name}: {part}" for part in value if value[part]] if isinstance(value, dict) else [name] if value else []
    found += [f"{kind}: {key}" for kind, of_kind in patcher.wrappers.items() for key, value in of_kind.items() if value]
    return list(dict.fromkeys(map(str, found)))


def _listed(names) -> str:
    names = list(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
