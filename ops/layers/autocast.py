"""Support of torch.autocast in layers whose products autocast does not know."""
import functools
from collections.abc import Callable

import torch


def autocast_input(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: under autocast, runs a method without it, on the input in autocast's dtype.

    Autocast would cast only some of what the method computes, and would round a patched weight to
    the nearest value, which loses a weak LoRA.

    Args:
        run: a layer's method (self, input, ...).
    """
    @functools.wraps(run)
    def cast_once(self, input, *args, **kwargs):
        device = input.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return run(self, input, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(self, input.to(torch.get_autocast_dtype(device)), *args, **kwargs)

    return cast_once
