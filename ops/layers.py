"""The layers that hold packed weights: Linear, Embedding, convolutions and experts."""
import contextlib
import copy

import comfy.float
import comfy.ops
import torch

from . import int8, product, stochastic_rounding
from .autocast import autocast_input
from .layer_patches import LayerPatches
from .low_rank import dense_linear
from .packed_layout import (
    PickledWeight,
    QuantizedTensor,
    for_state_dict,
    is_packed,
    pack_16bit,
    safe_detach,
    select_packed,
    squeeze_to,
)
from .packed_tensor import relabel
from .workspace import shared_workspace


class PackedLayer:
    """What the packed layers share. A mixin before one of the host's layer classes.

    `value_dtype`: dequantised values are rounded to this dtype before they are cast to the compute
    dtype; None: not.
    `patch_dtype`: dtype in which the host adds patches to a dequantised weight; None: the host's
    choice.
    `compute`: "exact", or "int8" for linear layers that multiply in whole numbers where they can.
    """

    value_dtype: torch.dtype | None = None
    patch_dtype: torch.dtype | None = None
    compute = "exact"
    new: tuple  # (function, its arguments) that makes a layer of this class without anything in it
    # whether plain LoRAs run beside the product instead of on the dequantised weight
    has_branch = False
    lora: LayerPatches | None  # set and cleared by the patcher

    def __init__(self, *args, device=None, **kwargs):
        # the file's own bytes replace these parameters at load
        super().__init__(*args, device="meta", **kwargs)
        self._scratch = shared_workspace()
        # the layer's own from the start: torch.compile would take its coming for a change of the
        # layer
        self.lora = None

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__
        return copied

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return copied

    def __reduce_ex__(self, protocol):
        parameters = {name: PickledWeight.of(param) for name, param in self._parameters.items()}
        return *self.new, self.__dict__ | {"_parameters": parameters, "_scratch": None}

    def __setstate__(self, state):
        super().__setstate__(state | {"_scratch": shared_workspace()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, param in self._parameters.items():
            key = prefix + name
            if param is None:
                continue
            value = state_dict.get(key)
            if value is None:
                missing_keys.append(key)
                # takes no memory; whole encoders are missed
                value = torch.zeros((), dtype=param.dtype).expand(param.shape)
                self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
                continue
            value = squeeze_to(value, param.shape)
            if value.shape != param.shape:
                error_msgs.append(
                    f"{key} has shape {tuple(value.shape)}, the model expects {tuple(param.shape)}."
                )
                continue
            if is_packed(value) and name == "weight":
                value = relabel(value, dtype=param.dtype)
            elif is_packed(value):
                value = product.dequantize(value, param.dtype)  # a bias: the product takes it dense
            elif name == "weight":
                value = pack_16bit(value, value.dtype if assign else param.dtype)
            elif not assign:
                value = value.to(param.dtype)
            self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        unexpected_keys.extend(
            key for key in state_dict
            if key.startswith(prefix) and self._parameters.get(key[len(prefix):]) is None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars=True)
        if not keep_vars:
            destination |= {
                prefix + name: for_state_dict(param) for name, param in self._parameters.items()
                if param is not None
            }

    def _apply(self, fn, recurse=True):
        # torch would rebuild the parameters in place, which dequantises them.
        for name, param in self._parameters.items():
            if param is not None and not param.is_meta:
                # the host frees memory outside of it, and runs inside
                with torch.inference_mode(param.is_inference()):
                    self._parameters[name] = torch.nn.Parameter(safe_detach(fn(param)),
                                                                requires_grad=False)
        return self

    def cast_for(self, input: torch.Tensor):
        """(weight, bias, stream) on the device of `input`, as `comfy.ops.uncast_bias_weight` takes
        them back.

        A packed weight keeps its dtype on the way to the device: any other would make the host
        dequantise it. Functions on the weight do need it dense.
        """
        packed = isinstance(self.weight, QuantizedTensor)
        dtype = self.weight.dtype if packed and not self.weight_function else input.dtype
        return comfy.ops.cast_bias_weight(self, dtype=dtype, device=input.device,
                                          bias_dtype=input.dtype, offloadable=True,
                                          compute_dtype=input.dtype)

    def dense_weight(self, weight, dtype: torch.dtype) -> torch.Tensor:
        """The values of a packed weight in `dtype`."""
        return product.dequantize(weight, dtype, self.value_dtype)

    def patched_weight(self, weight, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight in `dtype` with the patches that change the weight itself, from a packed
        or a dense one."""
        patched = self.lora is not None and self.lora.weight_patches
        if not isinstance(weight, QuantizedTensor):
            if not patched:
                return weight
            return stochastic_rounding.stochastic_round(
                self.lora.patch_weight(weight.to(self.patch_dtype or torch.float32, copy=True)),
                dtype)
        if not patched:
            plain = product.plain_values(weight, dtype)
            return self.dense_weight(weight, dtype) if plain is None else plain
        if is_packed(weight) and self.lora.acts_on_rows and self.patch_dtype is None:
            return product.dequantize_rows(weight, dtype, self.lora.patch_rows, self.value_dtype)
        return stochastic_rounding.stochastic_round(
            self.lora.patch_weight(self.dense_weight(weight, self.patch_dtype or torch.float32)),
            dtype)

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The dense weight the host adds patches to."""
        return (
            self.dense_weight(weight, self.patch_dtype or weight.dtype)
            if isinstance(weight, QuantizedTensor)
            else weight
        )

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take a patched weight from the host. It stays dense: packing it again would lose the
        patch."""
        weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        if return_weight:
            return weight
        if inplace_update and not isinstance(self.weight, QuantizedTensor):
            self.weight.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


class PackedLinear(PackedLayer):
    has_branch = True

    @autocast_input
    def forward_comfy_cast_weights(self, input):
        weight, bias, offload_stream = self.cast_for(input)
        low_rank = None if self.lora is None else self.lora.branch(input)
        if is_packed(weight) and (self.lora is None or not self.lora.weight_patches):
            multiply = int8.linear if self.compute == "int8" else product.linear
            out = multiply(input, weight, bias, self.value_dtype, low_rank)
        else:
            out = dense_linear(input, self.patched_weight(weight, input.dtype), bias, low_rank)
        comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)
        return out


class Linear(PackedLinear, comfy.ops.manual_cast.Linear):
    pass


class Embedding(PackedLayer, comfy.ops.manual_cast.Embedding):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A converter may leave out the last rows, those of ids for which the tokenizer has no token
        # (Gemma 3).
        table = state_dict.get(f"{prefix}weight")
        if table is not None and table.ndim == 2 and table.shape[0] < self.num_embeddings:
            self.num_embeddings = table.shape[0]
            self.weight = torch.nn.Parameter(self.weight[:self.num_embeddings], requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward_comfy_cast_weights(self, input, out_dtype=None):
        if self.weight_function or not (is_packed(self.weight) or self.lora is not None):
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        ids, dtype = input.to(self.weight.device), out_dtype or self.weight.dtype
        if self.lora is None:
            rows = product.embedding(ids, self.weight, dtype)  # the rows travel, not the table
        else:
            rows = torch.nn.functional.embedding(ids, self.patched_weight(self.weight, dtype))
        return rows.to(input.device)


class _PackedConv(PackedLayer):
    @property
    def has_branch(self) -> bool:
        return self.groups == 1

    @autocast_input
    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        weight, bias, offload_stream = self.cast_for(input)
        out = self._conv_forward(input, weight, bias, *args, **kwargs)
        comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)
        return out

    def _conv_forward(self, input, weight, bias, *args, **kwargs):
        if input.ndim < self.weight.ndim:  # torch takes one without a batch too
            return self._conv_forward(input.unsqueeze(0), weight, bias, *args, **kwargs).squeeze(0)
        low_rank = None if self.lora is None else self.lora.branch(input)
        out = self._without_branch(input, weight, bias, *args, **kwargs)
        if low_rank is None:
            return out
        hidden = super()._conv_forward(input, low_rank.down.view(-1, *self.weight.shape[1:]), None,
                                       *args, **kwargs)
        for (row, row_end, rank, rank_end), up in low_rank.parts():
            change = torch.einsum("nr,br...->bn...", up, hidden[:, rank:rank_end])
            out[:, row:row_end] = stochastic_rounding.add_small(out[:, row:row_end], change)
        return out

    def _without_branch(self, input, weight, bias, *args, **kwargs):
        patched = self.lora is not None and self.lora.weight_patches
        if patched or not is_packed(weight) or not product.fits_workspace(weight, input):
            return super()._conv_forward(input, self.patched_weight(weight, input.dtype), bias,
                                         *args, **kwargs)
        with product.dequantize_into_workspace(weight, input.dtype, self.value_dtype) as dense:
            return super()._conv_forward(input, dense, bias, *args, **kwargs)


class Conv1d(_PackedConv, comfy.ops.manual_cast.Conv1d):
    pass


class Conv2d(_PackedConv, comfy.ops.manual_cast.Conv2d):
    pass


class Conv3d(_PackedConv, comfy.ops.manual_cast.Conv3d):
    pass


class _Experts(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """The parameters of the host's `MoEExperts`: weight (experts, N, K), bias (experts, N)."""

    comfy_cast_weights = True

    def __init__(self, num_experts, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype),
            requires_grad=False)
        self.bias = (
            torch.nn.Parameter(
                torch.empty(num_experts, out_features, device=device, dtype=dtype),
                requires_grad=False,
            )
            if bias
            else None
        )


class MoEExperts(PackedLayer, _Experts):
    """As many linear layers as there are experts, in one weight. Only those asked for are
    dequantised, one at a time, unless a patch, such as a DoRA, needs the whole weight at once."""

    _resident = None

    @contextlib.contextmanager
    def bank_resident(self, input):
        """Inside this block all experts are on the device of `input`."""
        weight, bias, offload_stream = self.cast_for(input)
        whole = self.lora is not None and not self.lora.acts_on_rows
        self._resident = self.patched_weight(weight, input.dtype) if whole else weight, bias
        try:
            yield self
        finally:
            self._resident = None
            comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)

    @autocast_input
    def expert_linear(self, input: torch.Tensor, expert: int) -> torch.Tensor:
        """The layer of one expert. input: (..., K). Returns (..., N)."""
        if self._resident is None:
            with self.bank_resident(input):
                return self.expert_linear(input, expert)
        weight, bias = self._resident
        bias = None if bias is None else bias[expert].to(input.dtype)
        weight = select_packed(weight, expert) if is_packed(weight) else weight[expert]
        if self.lora is not None and self.lora.acts_on_rows:
            weight = self._patched_expert(weight, expert, input.dtype)
        if is_packed(weight):
            return product.linear(input, weight, bias, self.value_dtype)
        return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

    def _patched_expert(self, weight: torch.Tensor, expert: int,
                        dtype: torch.dtype) -> torch.Tensor:
        """The dense weight of one expert in `dtype` with its part of the patches. weight: (N, K),
        packed or not."""
        patch_dtype = self.patch_dtype or torch.float32
        dense = (
            self.dense_weight(weight, patch_dtype)
            if is_packed(weight)
            else weight.to(patch_dtype, copy=True)
        )
        return stochastic_rounding.stochastic_round(
            self.lora.patch_rows(dense[None], expert)[0], dtype)


PACKED_LAYERS = (Linear, Embedding, Conv1d, Conv2d, Conv3d, MoEExperts)
