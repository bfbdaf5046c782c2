"""The first step of a model's first run is counted, and before the next its layers are brought into the order that it asks for.

Between two steps no layer runs. A next run then finds all in its place.
"""
import sys

import comfy.model_management
import torch

from .counting import Counter
from .placing import PlacingPatcher


class FirstStepPatcher(PlacingPatcher):
    """The methods of the host's patchers that are called before and after steps."""

    _counter = None  # in the first step: what counts it

    def prepare_state(self, timestep, model_options):
        """The host calls it before it runs a model, once or more in each step."""
        self.model.packed_patches.watch()
        if self._counter is not None and not torch.equal(timestep, self._counter.moment):
            self._end_counting()
            self._bring_into_order()
        if self._counter is None and self._is_unknown():
            self._counter = Counter(self.model, timestep.clone())
        super().prepare_state(timestep, model_options)

    def _is_unknown(self) -> bool:
        """Whether a part of the model is copied, and no step has shown what runs."""
        return (self.placement is not None and self.model.packed_patches.step is None
                and (self.is_dynamic() or self.model.model_lowvram) and self.whereabouts().copied > 0)

    def _end_counting(self):
        self.model.packed_patches.step, self._counter = self._counter.stop(), None

    def _bring_into_order(self):
        """Between two steps. With hooks, whose weights the host keeps where it needs them, the next load does it."""
        applied = self.model.packed_patches
        if self._is_in_order() or applied.evicted or self.current_hooks is not None or self.cached_hook_patches:
            return
        with comfy.model_management.cuda_device_context(self.load_device):
            comfy.model_management.synchronize()  # the device may still read what is to move
            try:
                if self.is_dynamic():
                    self.load(self.load_device)
                else:
                    self.load(self.load_device, applied.room, full_load=applied.room > self.model_size())
            except Exception:
                self.detach()
                raise
        if self.tell is not None:
            self.tell(self, self.whereabouts(expected=True))

    def cleanup(self):
        """The host calls it at the end of a run, also when it fails."""
        if self._counter is not None:
            self._end_counting()
            if sys.exc_info()[0] is not None:
                self.model.packed_patches.step = None  # it was no whole step
            elif not self.is_dynamic():  # which would be empty then, and brings nothing when it loads
                self._bring_into_order()
        super().cleanup()
