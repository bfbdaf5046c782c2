"""Models as diffusers keeps them, made of the host's own by the host's own tables."""
import comfy.utils

# Names of the host's layers for those of diffusers, by the host's own tables.
DIFFUSERS = {
    "flux-dev": lambda config: comfy.utils.flux_to_diffusers(config),
    "sd3.5": lambda config: comfy.utils.mmdit_to_diffusers({**config, "num_blocks": config["depth"]}),
    "aura-flow": lambda config: comfy.utils.auraflow_to_diffusers(config),
    "pixart-sigma": lambda config: comfy.utils.pixart_to_diffusers(config),
    "z-image": lambda config: comfy.utils.z_image_to_diffusers(config),
}


def in_diffusers_names(weights, table):
    """The weights as diffusers keeps them: q, k and v apart, shift and scale swapped."""
    stored = {}
    for name, target in table.items():
        target, place, change = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if target in weights:
            values = weights[target] if place is None else weights[target].narrow(*place)
            stored[name] = change(values) if change else values
    return stored
