"""Layers of files that hold both packed weights and weights in the host's `comfy_quant` formats."""
from typing import Any

import comfy.ops
import torch

from ..tensor.packed_layout import QuantizedTensor, is_comfy_quantized, is_packed
from ..tensor.packed_tensor import relabel
from .autocast import autocast_input
from .fused_calls import FusedCall, fuses_in_forward
from .packed_layers import Embedding, PackedLayer, PackedLinear
from .product import needs_gradient
from .rounded_sum import add_branch

# comfy_kitchen multiplies by the transposed weight only, and the gradient needs it as it is
WITHOUT_GRADIENT = ("AsymW4A8Int8Layout",)


class MixedLayer(PackedLayer):
    """Base of layers whose weight is packed or in one of the host's formats, as the file has it.

    A mixin before a packed layer. That stands before the host's layer of the same kind in
    `mixed_precision_ops`, whose methods load and save the host's formats.
    """

    @property
    def _host_super(self) -> Any:
        """`super()` as the packed layers see it: the methods of the host's own layer."""
        return super(PackedLayer, self)

    @property
    def _has_host_format(self) -> bool:
        return is_comfy_quantized(self.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}comfy_quant" not in state_dict:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        bias = self._parameters.get("bias")
        if bias is not None:
            self.bias = torch.nn.Parameter(torch.empty_like(bias, device="cpu"),
                                           requires_grad=False)
        dtype = self.weight.dtype
        self._host_super._load_from_state_dict(state_dict, prefix, *args)
        # the host's embedding takes the dtype from the operations class, which has none
        weight: Any = self.weight
        if self._has_host_format:
            weight = relabel(weight, dtype=dtype)
            weight = weight.dequantize() if self.stays_plain(weight) else weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def state_dict(self, *args, **kwargs):
        """Returns whole tensors, from which other models can make patches."""
        return torch.nn.Module.state_dict(self, *args, **kwargs)

    def quantized_parts(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns what files hold of a weight in a host format: codes, scales and format name."""
        parts = self._host_super.state_dict(prefix=prefix)
        parts.pop(f"{prefix}bias", None)
        return parts

    def dense_weight(self, weight, dtype):
        if is_packed(weight):
            return super().dense_weight(weight, dtype)
        return self._smoothed(relabel(weight, dtype=dtype).dequantize())

    def patched_weight(self, weight, dtype):
        # with dynamic VRAM the host hands over a dense weight on a CPU
        if self._has_host_format and not isinstance(weight, QuantizedTensor):
            weight = self._smoothed(weight)
        return super().patched_weight(weight, dtype)

    def _smoothed(self, dense: torch.Tensor) -> torch.Tensor:
        """Multiplies a weight by `pre_quant_scale`, as the host's product multiplies the input."""
        scale = getattr(self, "pre_quant_scale", None)
        return dense if scale is None else dense * scale.to(dense)


class MixedLinear(MixedLayer, PackedLinear):
    """A linear layer that leaves products with the host's formats to the host.

    Patches are ours in every format, so that no weight is quantised again.
    """

    in_features: int
    out_features: int
    _full_precision_mm: bool
    _forced = False

    def __init__(self, *args, dtype=None, **kwargs):
        super().__init__(*args, dtype=dtype, **kwargs)
        # the host loads its formats to the default device, not to meta
        self.factory_kwargs = {"device": None, "dtype": dtype}
        shape = (self.out_features, self.in_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype),
                                         requires_grad=False)

    def forward(self, input, *args, **kwargs):
        if not args and not kwargs:
            return self._product(input)
        host_forward = self._host_super.forward
        if not self.comfy_force_forward and fuses_in_forward(host_forward.__func__):
            return host_forward(input, *args, **kwargs)
        return FusedCall.of(args, kwargs).around(self._product, input)

    @property
    def comfy_force_forward(self) -> bool:
        """Whether the host, which reads the weight in fused calls, must call `forward` instead.

        The host's bypass of LoRAs sets it too.
        """
        return self._forced or self.lora is not None or not self._runs_in_host

    @comfy_force_forward.setter
    def comfy_force_forward(self, value: bool):
        self._forced = value

    @comfy_force_forward.deleter
    def comfy_force_forward(self):
        self._forced = False

    @property
    def _runs_in_host(self) -> bool:
        """Whether the product, without a branch, is the host's."""
        return self.is_for_host and not (self.lora is not None and self.lora.weight_patches)

    @property
    def is_for_host(self) -> bool:
        """Whether the host has a product of its own for the weight, unless patches change it."""
        in_float = self._full_precision_mm and not self.weight_function
        return self._has_host_format and not in_float

    def _lacks_gradient(self, input) -> bool:
        """Returns whether a gradient is wanted of an input for which the host has none."""
        layout = getattr(self.weight, "_layout_cls", None)
        return needs_gradient(input) and layout in WITHOUT_GRADIENT

    @autocast_input
    def _product(self, input):
        if not self._runs_in_host or self._lacks_gradient(input):
            comfy.ops.run_every_op()
            return super()._product(input)
        out = self._host_super.forward(input)
        if self.lora is None:
            return out
        low_rank = self.lora.branch(input)
        assert low_rank is not None  # layers with other patches run in float
        return add_branch(out, input, low_rank)

    def forward_comfy_cast_weights(self, *args, **kwargs):
        """Runs the host's method, since the host's `forward` calls it."""
        return self._host_super.forward_comfy_cast_weights(*args, **kwargs)


class MixedEmbedding(MixedLayer, Embedding):
    """An embedding that leaves lookups in the host's formats to the host, unless it is patched."""
