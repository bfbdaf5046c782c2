"""Says which layers multiply in float, and not by ComfyUI's kernels, because of their patches."""
from ..layers.comfy_quant_layers import MixedLinear
from ..patches.layer_patches import divide
from .applied_patches import layer_of, packed_keys


def float_layers(patcher) -> list[str]:
    """Returns the names of the weights that patches keep from ComfyUI's own product.

    They are those in ComfyUI's formats with patches that are not plain LoRAs.
    """
    layers = {key: layer_of(patcher, key) for key in packed_keys(patcher)}
    return [key for key, layer in layers.items()
            if isinstance(layer, MixedLinear) and layer.is_for_host
            and divide(patcher.all_patches[key])[1]]


def float_layers_text(patcher) -> str | None:
    """Returns a sentence about `float_layers`, None where there are none."""
    keys = float_layers(patcher)
    if not keys:
        return None
    total = sum(isinstance(module, MixedLinear) and module.is_for_host
                for module in patcher.model.modules())
    return (f"{len(keys)} of the {total} layers that ComfyUI's kernels multiply run in float, which"
            " is slower: DoRA, LoHa, LoKr and other patches that are not plain LoRAs change their"
            f" weights, such as {keys[0]}. Plain LoRAs leave ComfyUI's kernels in use.")
