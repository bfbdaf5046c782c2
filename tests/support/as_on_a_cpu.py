"""ComfyUI computes on a GPU what it computes on a CPU, to the bit: what its arguments cannot say. A
pack for servers, too.

On a GPU it computes models in its own quantised formats in 16 bits whatever `--fp32-unet` says, the
LoRAs of dense weights in 16 bits, and the noise that samplers add in each step from another seed.
"""
import comfy.k_diffusion.sampling
import comfy.model_management
import torch

NODE_CLASS_MAPPINGS = {}

if not comfy.model_management.cpu_mode():
    _cast = comfy.model_management.unet_manual_cast
    comfy.model_management.unet_manual_cast = lambda dtype, device, *supported: _cast(
        dtype, torch.device("cpu"), *supported)
    _devices = comfy.model_management.get_all_torch_devices()
    comfy.model_management.LORA_COMPUTE_DTYPES.update(dict.fromkeys(_devices, torch.float32))
    _noise = comfy.k_diffusion.sampling.default_noise_sampler
    comfy.k_diffusion.sampling.default_noise_sampler = lambda x, seed=None: _noise(
        x, None if seed is None else seed + (x.device.type != "cpu"))
