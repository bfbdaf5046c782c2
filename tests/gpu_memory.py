"""What of a model lies on a fake GPU, models loaded in part, and a step of the small Flux there."""
import comfy.model_management
import torch
from patched_models import flux_inputs, parts


def lies_on(model, device="cuda") -> int:
    """Bytes of weights and of LoRAs' factors that lie on a device."""
    tensors = [part for weight in (*model.parameters(), *model.buffers()) for part in parts(weight)]
    tensors += [tensor for layer in model.packed_patches.layers.values() if layer.low_rank is not None
                for tensor in (layer.low_rank.down, *layer.low_rank.ups)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device)


def load(patcher, room: float):
    """Load a model while this many bytes are free for weights, as other programs come and go."""
    import fakegpu

    fakegpu.set_capacity(comfy.model_management.minimum_inference_memory() + room + fakegpu.used() - lies_on(patcher.model))
    comfy.model_management.load_models_gpu([patcher])


def step(patcher):
    inputs = {name: value.cuda() for name, value in flux_inputs().items()}
    with torch.no_grad():
        return patcher.model.apply_model(**inputs).float().cpu()
