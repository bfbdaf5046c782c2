"""The layers of a file that also holds weights in the host's own quantised formats (`comfy_quant`)
beside packed ones."""
import comfy.ops
import torch

from . import stochastic_rounding
from .autocast import autocast_input
from .layers import Embedding, PackedLayer, PackedLinear
from .packed_layout import QuantizedTensor, is_packed
from .packed_tensor import relabel


class MixedLayer:
    """What layers share that are packed, or in one of the host's own quantised formats, as their
    part of the file says.

    A mixin before a packed layer, which goes before its like of the host's `mixed_precision_ops`,
    whose methods load and save the host's formats.
    """

    @property
    def _super_past_ours(self):
        """`super()` as the packed layers would see it: the methods of the host's own layer."""
        return super(PackedLayer, self)

    @property
    def _is_the_hosts(self) -> bool:
        return isinstance(self.weight, QuantizedTensor) and not is_packed(self.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}comfy_quant" not in state_dict:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        if self._parameters.get("bias") is not None:
            self.bias = torch.nn.Parameter(torch.empty_like(self.bias, device="cpu"),
                                           requires_grad=False)
        dtype = self.weight.dtype
        self._super_past_ours._load_from_state_dict(state_dict, prefix, *args)
        # its embedding asks the operations class for the dtype, which has none
        if self._is_the_hosts:
            self.weight = torch.nn.Parameter(relabel(self.weight, dtype=dtype),
                                             requires_grad=False)

    def state_dict(self, *args, **kwargs):
        # whole tensors, of which other models can make patches
        return torch.nn.Module.state_dict(self, *args, **kwargs)

    def quantized_parts(self, prefix: str) -> dict[str, torch.Tensor]:
        """What files keep of a weight in a format of the host: codes, scales and the name of the
        format."""
        parts = self._super_past_ours.state_dict(prefix=prefix)
        parts.pop(f"{prefix}bias", None)
        return parts

    def dense_weight(self, weight, dtype):
        if is_packed(weight):
            return super().dense_weight(weight, dtype)
        return self._smoothed(relabel(weight, dtype=dtype).dequantize())

    def patched_weight(self, weight, dtype):
        # so it comes in dynamic VRAM, on a CPU
        if self._is_the_hosts and not isinstance(weight, QuantizedTensor):
            weight = self._smoothed(weight)
        return super().patched_weight(weight, dtype)

    def _smoothed(self, dense: torch.Tensor) -> torch.Tensor:
        """The weight for the input as it is. The host's own product takes the input times
        `pre_quant_scale`."""
        scale = getattr(self, "pre_quant_scale", None)
        return dense if scale is None else dense * scale.to(dense)


class MixedLinear(MixedLayer, PackedLinear):
    """The products of the host's formats are the host's. Patches are ours in all: no weight is ever
    quantised again."""

    def __init__(self, *args, dtype=None, **kwargs):
        super().__init__(*args, dtype=dtype, **kwargs)
        # for what the host loads, which is not on meta
        self.factory_kwargs = {"device": None, "dtype": dtype}
        shape = (self.out_features, self.in_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype),
                                         requires_grad=False)

    @autocast_input
    def forward(self, input, *args, **kwargs):
        in_float = self._full_precision_mm or (self.lora is not None and self.lora.weight_patches)
        if not self._is_the_hosts or (in_float and not self.weight_function):
            comfy.ops.run_every_op()
            return super().forward_comfy_cast_weights(input)
        out = self._super_past_ours.forward(input, *args, **kwargs)
        if self.lora is None:
            return out
        flat = input.reshape(-1, self.in_features)
        return stochastic_rounding.add_small(
            out,
            self.lora.branch(input).product(flat, self.out_features).view(out.shape))

    def forward_comfy_cast_weights(self, *args, **kwargs):
        # the host's `forward` goes on here
        return self._super_past_ours.forward_comfy_cast_weights(*args, **kwargs)


class MixedEmbedding(MixedLayer, Embedding):
    """Rows of the host's formats are looked up by the host, unless patches change them."""
