"""torch.autocast, for layers whose products it does not know."""
import functools

import torch


def autocast_input(run):
    """A layer's method (self, input, ...) that gives under autocast what it gives without for an
    input in autocast's dtype.

    Autocast would cast only some of what the method does, and to the nearest what is patched, of
    which a weak LoRA is lost.
    """
    @functools.wraps(run)
    def cast_once(self, input, *args, **kwargs):
        device = input.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return run(self, input, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(self, input.to(torch.get_autocast_dtype(device)), *args, **kwargs)

    return cast_once
