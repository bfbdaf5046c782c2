"""Whether a device has room for a trial."""
import math

import torch


def free_bytes(device: torch.device) -> float:
    """Of a GPU; infinity of a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return math.inf
