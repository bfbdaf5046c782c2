"""What ComfyUI makes of a weight and its patches, as the reference of tests."""
import comfy.lora
import torch


def patched_by_host(patches: list, weight: torch.Tensor, key: str = "weight") -> torch.Tensor:
    """The patched weight, in new memory. ComfyUI leaves a weight as it is where a patch does not
    fit, and says so in the log alone: then a test would compare two weights without a patch."""
    patched = comfy.lora.calculate_weight(patches, weight.clone(), key)
    assert not patches or not torch.equal(patched, weight), "ComfyUI has dropped the patch"
    return patched
