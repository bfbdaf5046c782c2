"""The DoRA of PEFT, which the host computes in another way."""
import torch
from comfy.weight_adapter import LoRAAdapter

from ..pickle_names import stable_pickle_name
from .adapters import LoRA, adapter_fields, alpha_scale


@stable_pickle_name
class PeftDora(LoRAAdapter):
    """A LoRA that gives each row of the changed weight a norm of its own.

    PEFT (tuners/lora/dora.py) divides by the norm of each row of the changed weight, the host
    (comfy/weight_adapter/base.py, weight_decompose) by that of the old one. Here `dora_scale`
    (rows, 1) is PEFT's magnitude vector.
    """

    @classmethod
    def of(cls, adapter: LoRAAdapter, magnitudes: torch.Tensor) -> "PeftDora":
        """Returns a plain LoRA with a magnitude vector, of any shape."""
        up, down, alpha, _, _, reshape = adapter.weights
        return cls(adapter.loaded_keys, (up, down, alpha, None, magnitudes.reshape(-1, 1), reshape))

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """Returns the weight, moved in place towards the one that PEFT merges by `strength`."""
        lora = adapter_fields(self)
        assert isinstance(lora, LoRA) and lora.dora_scale is not None
        up, down, norms = (
            tensor.to(weight.device, intermediate_dtype)
            for tensor in (lora.up, lora.down, lora.dora_scale)
        )
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        changed = weight + function(change * alpha_scale(lora.alpha, down.shape[0]))
        rows = changed.flatten(1)
        rows *= function(norms) / rows.norm(dim=1, keepdim=True).clamp_min(
            torch.finfo(rows.dtype).tiny)
        weight += strength * (rows.reshape(weight.shape) - weight).to(weight.dtype)
        return weight
