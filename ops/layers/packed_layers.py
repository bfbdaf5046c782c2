"""The layers that hold packed weights: Linear, Embedding, convolutions and experts."""
import contextlib
import copy
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.float
import comfy.ops
import torch

from .. import stochastic_rounding
from ..low_rank import dense_linear
from ..patches.layer_patches import LayerPatches
from ..stable_names import stable_pickle_name
from ..tensor.packed_layout import (
    PickledWeight,
    QuantizedTensor,
    for_state_dict,
    is_packed,
    pack_16bit,
    reshape_to,
    safe_detach,
)
from ..tensor.packed_tensor import relabel
from ..tensor.row_slicing import take_rows, without_padding
from . import EXACT, FAST, INT8, cpu_convolution, product
from .autocast import autocast_input
from .fused_calls import FusedCall, keep_forward, known_arguments
from .rounded_sum import add_small
from .workspace import shared_workspace

# ComfyUI reads some tables past their layer, and adds patches to plain ones alone: of at most so
# many bytes they are plain.
PLAIN_TABLE_BYTES = 32 << 20
# a module of them
TOKENS = re.compile(r"(^|\.)(token_embedding|embed_tokens|shared|(word|tok)_embeddings)\.$")

if TYPE_CHECKING:

    class _HostLayer(torch.nn.Module, comfy.ops.CastWeightBiasOp):
        """The members of the host's layers that the mixins below use."""

        weight: torch.Tensor
        bias: torch.Tensor | None
        groups: int

        def __init__(self, *args, device=None, dtype=None, **kwargs): ...

        def _conv_forward(self, input, weight, bias, *args, **kwargs) -> torch.Tensor: ...

        def host_rows(self, ids) -> torch.Tensor: ...
else:
    _HostLayer = object


class PackedLayer(_HostLayer):
    """Base of the packed layers: a mixin before one of the host's layer classes.

    Attributes:
        compute: FAST for linear layers that multiply integers where they can, by
            `fast_by_kitchen` or `fast_on_cpu`. All others are exact.
        new: (function, its arguments) that makes an uninitialised layer of this class.
        has_branch: whether plain LoRAs run as a low-rank branch, not on the dequantised weight.
        is_table: whether ComfyUI may read the weight past the layer, with no product.
        lora: the layer's patches, set and cleared by the patcher.
    """

    compute = EXACT
    new: tuple
    has_branch = False
    is_table = False
    lora: LayerPatches | None

    def __init__(self, *args, device=None, **kwargs):
        # the file's own bytes replace these parameters at load
        super().__init__(*args, device="meta", **kwargs)
        self._workspace = shared_workspace()
        self.lora = None  # set from the start, since torch.compile guards on which attributes exist

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__
        return copied

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return copied

    def __reduce_ex__(self, protocol):
        parameters = {name: None if param is None else PickledWeight(param)
                      for name, param in self._parameters.items()}
        return *self.new, self.__dict__ | {"_parameters": parameters, "_workspace": None}

    def __setstate__(self, state):
        if state.get("compute") == INT8:
            state = state | {"compute": FAST}
        super().__setstate__(state | {"_workspace": shared_workspace()})

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
                # expanded, so that it takes no memory: whole encoders may be missing
                value = torch.zeros((), dtype=param.dtype).expand(param.shape)
                self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
                continue
            value = without_padding(reshape_to(value, param.shape), param.shape)
            weight = state_dict.get(f"{prefix}weight")
            if name == "bias" and is_packed(weight) and len(weight) == value.numel():
                value = value[:len(param)]  # rows that the weight is filled up with have one too
            if value.shape != param.shape:
                error_msgs.append(
                    f"{key} has shape {tuple(value.shape)}, the model expects {tuple(param.shape)}."
                )
                continue
            # products take a dense bias
            is_plain = name == "bias" or self.stays_plain(param)
            if is_packed(value) and is_plain:
                value = product.dequantize(value, param.dtype)
            elif is_packed(value):
                value = relabel(value, dtype=param.dtype)
            elif not is_plain:
                value = pack_16bit(value, value.dtype if assign else param.dtype)
            elif not assign:
                value = value.to(param.dtype)
            self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        unexpected_keys.extend(
            key for key in state_dict
            if key.startswith(prefix) and self._parameters.get(key[len(prefix):]) is None)

    def stays_plain(self, weight: torch.Tensor) -> bool:
        """Returns whether a weight, of the shape and dtype of the layer's, is not to be packed."""
        return self.is_table and weight.numel() * weight.dtype.itemsize <= PLAIN_TABLE_BYTES

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars=True)
        if not keep_vars:
            destination |= {
                prefix + name: for_state_dict(param) for name, param in self._parameters.items()
                if param is not None
            }

    def _apply(self, fn, recurse=True):
        # torch would rebuild the parameters in place, which dequantises them
        for name, param in self._parameters.items():
            if param is not None and not param.is_meta:
                # the host runs models in inference mode and frees memory outside of it
                with torch.inference_mode(param.is_inference()):
                    self._parameters[name] = torch.nn.Parameter(safe_detach(fn(param)),
                                                                requires_grad=False)
        return self

    def cast_weight_bias(self, input: torch.Tensor) -> tuple[Any, Any, Any]:
        """Returns (weight, bias, stream) on the device of `input`.

        They go back to `comfy.ops.uncast_bias_weight` after use. A packed weight keeps its dtype
        on the way to the device, because any other would make the host dequantise it. Functions on
        the weight do need it dense.
        """
        weight: Any = self.weight
        bias, device = self.bias, input.device
        packed = isinstance(weight, QuantizedTensor)
        if (packed and weight.device == device and not self.weight_function
                and (bias is None or (bias.dtype == input.dtype and bias.device == device))
                and not self.bias_function and "_v" not in vars(self)):  # of dynamic VRAM
            return weight, bias, None  # as the host gives them
        dtype = weight.dtype if packed and not self.weight_function else input.dtype
        return comfy.ops.cast_bias_weight(self, dtype=dtype, device=input.device,
                                          bias_dtype=input.dtype, offloadable=True,
                                          compute_dtype=input.dtype)

    def is_unpatched(self, weight) -> bool:
        """Returns whether a weight is packed and no patch changes it."""
        return is_packed(weight) and (self.lora is None or not self.lora.weight_patches)

    def dense_weight(self, weight, dtype: torch.dtype) -> torch.Tensor:
        """Returns the values of a packed weight in `dtype`."""
        return product.dequantize(weight, dtype)

    def patched_weight(self, weight, dtype: torch.dtype) -> torch.Tensor:
        """Returns the dense weight with the patches that change the weight itself.

        Args:
            weight: packed or dense.
            dtype: of the result.
        """
        lora = self.lora
        if lora is None or not lora.weight_patches:
            if not isinstance(weight, QuantizedTensor):
                return weight
            plain = product.plain_values(weight, dtype)
            return self.dense_weight(weight, dtype) if plain is None else plain
        if is_packed(weight) and lora.acts_on_rows:
            return product.dequantize_rows(weight, dtype, lora.patch_rows)
        return self._with_patches(weight, dtype, lora.patch_weight)

    def _with_patches(self, weight, dtype: torch.dtype,
                      patch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns the dense weight in `dtype` with what `patch` adds in float32."""
        if isinstance(weight, QuantizedTensor):
            dense = self.dense_weight(weight, torch.float32)
        else:
            dense = weight.to(torch.float32, copy=True)
        return stochastic_rounding.stochastic_round(patch(dense), dtype)

    def convert_weight(self, weight, inplace=False, **kwargs):
        """Returns the dense weight the host adds patches to."""
        if not isinstance(weight, QuantizedTensor):
            return weight
        return self.dense_weight(weight, weight.dtype)

    def set_weight(self, weight, inplace_update=False, seed: Any = None, return_weight=False,
                   **kwargs):
        """Takes a patched weight from the host.

        It stays dense, since packing it again would lose the patch.
        """
        weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        if return_weight:
            return weight
        if inplace_update and not isinstance(self.weight, QuantizedTensor):
            self.weight.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


class PackedLinear(PackedLayer):
    """The product of a linear layer with a packed weight.

    Attributes:
        comfy_force_forward: has the host call `forward`, and not read the weight past it.
    """

    has_branch = True
    comfy_force_forward = True

    def forward(self, input, *args, **kwargs):
        comfy.ops.run_every_op()
        return self.forward_comfy_cast_weights(input, *args, **kwargs)

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        if not args and not kwargs:
            return self._product(input)
        return FusedCall.of(args, kwargs).around(self._product, input)

    @autocast_input
    def _product(self, input):
        weight, bias, offload_stream = self.cast_weight_bias(input)
        low_rank = None if self.lora is None else self.lora.branch(input)
        if self.is_unpatched(weight):
            out = product.linear(input, weight, bias, low_rank, fast=self.compute == FAST)
        else:
            out = dense_linear(input, self.patched_weight(weight, input.dtype), bias, low_rank)
        comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)
        return out


class Linear(PackedLinear, comfy.ops.manual_cast.Linear):
    """A linear layer with a packed weight."""


class Embedding(PackedLayer, comfy.ops.manual_cast.Embedding):
    """An embedding with a packed table, of which only the rows looked up are dequantised."""

    is_short = False  # has fewer rows than the model's
    is_table = True

    def _load_from_state_dict(self, state_dict, prefix, *args):
        table = state_dict.get(f"{prefix}weight")
        rows = None if table is None or table.ndim != 2 else len(table)
        # a converter may leave out the last rows, which belong to no token (Gemma 3)
        if rows is not None and rows < self.num_embeddings:
            self.is_short = True
            self.num_embeddings = rows
            self.weight = torch.nn.Parameter(self.weight[:rows], requires_grad=False)
        # or have more, of tokens that the host's tokenizer does not know (LLaVA-Llama 3)
        elif rows is not None and rows > self.num_embeddings and TOKENS.search(prefix):
            assert table is not None  # it has rows
            state_dict = {**state_dict,
                          f"{prefix}weight": take_rows(table, slice(0, self.num_embeddings))}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reject_unknown_tokens(self, ids):
        """Raises ValueError for a token that a short table has no row of, an assertion on a GPU."""
        if self.is_short and ids.numel() and int(ids.max()) >= self.num_embeddings:
            raise ValueError(
                f"The text encoder's file has the vectors of {self.num_embeddings} tokens, and the"
                f" text has token {int(ids.max())}: it was made for another vocabulary. Get another"
                " conversion of the text encoder.")

    def forward_comfy_cast_weights(self, input, out_dtype=None, **kwargs):
        known_arguments("an embedding", kwargs)
        self._reject_unknown_tokens(input)
        if not self._looks_up_here:
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        # the rows go to the device of the input, the table does not
        return self._rows(input, out_dtype or self.weight.dtype).to(input.device)

    def host_rows(self, ids):
        """Returns the rows of a table that stays in memory, where the host reads these alone."""
        self._reject_unknown_tokens(ids)
        if not self._looks_up_here:
            return super().host_rows(ids)
        return self._rows(ids, self.weight.dtype)

    @property
    def _looks_up_here(self) -> bool:
        is_alone = all(function is self.lora for function in self.weight_function)
        return is_alone and (is_packed(self.weight) or self.lora is not None)

    def _rows(self, ids, dtype):
        """Returns the rows of `ids` on the table's device."""
        ids = ids.to(self.weight.device)
        if is_packed(self.weight) and self.lora is None:
            return product.embedding(ids, self.weight, dtype)
        return torch.nn.functional.embedding(ids, self.patched_weight(self.weight, dtype))


class _PackedConv(PackedLayer):
    """The convolution of the layers below, with a packed kernel."""

    @property
    def has_branch(self) -> bool:
        return self.groups == 1

    @property
    def is_table(self) -> bool:  # of taps, one row for each channel
        return self.groups == self.weight.shape[0] > 1

    @autocast_input
    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        kwargs = known_arguments("a convolution", kwargs, "autopad")
        weight, bias, offload_stream = self.cast_weight_bias(input)
        out = self._conv_forward(input, weight, bias, *args, **kwargs)
        comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)
        return out

    def _conv_forward(self, input, weight, bias, *args, **kwargs):
        if input.ndim < self.weight.ndim:  # torch accepts an input without a batch dimension
            return self._conv_forward(input.unsqueeze(0), weight, bias, *args, **kwargs).squeeze(0)
        low_rank = None if self.lora is None else self.lora.branch(input)
        out = self._without_branch(input, weight, bias, *args, **kwargs)
        if low_rank is None:
            return out
        hidden = super()._conv_forward(input, low_rank.down.view(-1, *self.weight.shape[1:]), None,
                                       *args, **kwargs)
        for (row, row_end, rank, rank_end), up in low_rank.parts():
            change = torch.einsum("nr,br...->bn...", up, hidden[:, rank:rank_end])
            out[:, row:row_end] = add_small(out[:, row:row_end], change)
        return out

    def _without_branch(self, input, weight, bias, *args, **kwargs):
        if not self.is_unpatched(weight) or not product.fits_workspace(weight, input):
            return super()._conv_forward(input, self.patched_weight(weight, input.dtype), bias,
                                         *args, **kwargs)
        convolve = super()._conv_forward
        slices = product.dequantized_slices(weight, input.dtype, whole=self.groups > 1)
        with contextlib.closing(slices):  # an error that is kept would keep the workspace too
            parts = [
                convolve(input, dense, None if bias is None else bias[rows], *args, **kwargs)
                for rows, dense in slices
            ]
        return torch.cat(parts, 1) if parts[1:] else parts[0]


class PackedConv2d(_PackedConv):
    """The convolution of `Conv2d`, on a CPU as a product or with the channels last where that is
    faster."""

    def _without_branch(self, input, weight, bias, *args, **kwargs):
        conv: Any = self
        channels_last = (
            not (args or kwargs)
            and cpu_convolution.takes(conv, input, bias)
            and self.is_unpatched(weight)
            and product.fits_workspace(weight, input, reordered=True)
        )
        if not channels_last:
            return super()._without_branch(input, weight, bias, *args, **kwargs)
        if cpu_convolution.is_product(conv, input):
            matrix = relabel(weight, shape=(len(weight), weight.shape[1:].numel()))
            return cpu_convolution.multiply_patches(
                conv, input, lambda patches: product.linear(patches, matrix, bias))
        slices = product.dequantized_slices(weight, input.dtype, channels_last=True)
        with contextlib.closing(slices):
            return cpu_convolution.convolve(conv, input, slices, bias)


class Conv1d(_PackedConv, comfy.ops.manual_cast.Conv1d):
    """A 1-D convolution with a packed kernel."""


class Conv2d(PackedConv2d, comfy.ops.manual_cast.Conv2d):
    """A 2-D convolution with a packed kernel."""


class Conv3d(_PackedConv, comfy.ops.manual_cast.Conv3d):
    """A 3-D convolution with a packed kernel."""


class _Experts(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """The parameters of the host's `MoEExperts`: weight (experts, N, K), bias (experts, N)."""

    comfy_cast_weights = True

    def __init__(self, num_experts, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()

        def parameter(*shape):
            values = torch.empty(shape, device=device, dtype=dtype)
            return torch.nn.Parameter(values, requires_grad=False)

        self.weight = parameter(num_experts, out_features, in_features)
        self.bias = parameter(num_experts, out_features) if bias else None


class MoEExperts(PackedLayer, _Experts):
    """The linear layers of all experts, in one packed weight.

    Only the experts in use are dequantised, one at a time, unless a patch, such as a DoRA, needs
    the whole weight at once.
    """

    _resident: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @contextlib.contextmanager
    def bank_resident(self, input):
        """Keeps all experts on the device of `input` inside the block."""
        weight, bias, offload_stream = self.cast_weight_bias(input)
        needs_whole = self.lora is not None and not self.lora.acts_on_rows
        resident = self.patched_weight(weight, input.dtype) if needs_whole else weight
        self._resident = resident, bias
        try:
            yield self
        finally:
            self._resident = None
            comfy.ops.uncast_bias_weight(self, weight, bias, offload_stream)

    def expert_linear(self, input: torch.Tensor, expert: int, *args, **kwargs) -> torch.Tensor:
        """Runs the layer of one expert on an input (..., K), as a fused call. Returns (..., N)."""
        return FusedCall.of(args, kwargs).around(lambda x: self._expert_product(x, expert), input)

    @autocast_input
    def _expert_product(self, input: torch.Tensor, expert: int) -> torch.Tensor:
        if self._resident is None:
            with self.bank_resident(input):
                return self._expert_product(input, expert)
        weight, bias = self._resident
        bias = None if bias is None else bias[expert].to(input.dtype)
        weight = reshape_to(take_rows(weight, slice(expert, expert + 1)), weight.shape[1:])
        lora = self.lora
        if lora is not None and lora.acts_on_rows:
            weight = self._with_patches(
                weight, input.dtype, lambda dense: lora.patch_rows(dense[None], expert)[0])
        if is_packed(weight):
            return product.linear(input, weight, bias)
        return torch.nn.functional.linear(input, weight.to(input.dtype), bias)


PACKED_LAYERS = (Linear, Embedding, Conv1d, Conv2d, Conv3d, MoEExperts)


# torch's layer -> what makes a layer of the host that derives from it a packed one
_MIXINS = {
    torch.nn.Linear: PackedLinear, torch.nn.Conv1d: _PackedConv, torch.nn.Conv2d: PackedConv2d,
    torch.nn.Conv3d: _PackedConv,
}


def is_packable(layer: Any) -> bool:
    """Returns whether `make_packed` makes a layer a packed one: a linear layer or convolution of
    the host's whose weight is not computed from other parameters."""
    return (isinstance(layer, tuple(_MIXINS)) and isinstance(layer, comfy.ops.CastWeightBiasOp)
            and not isinstance(layer, PackedLayer)
            and not (hasattr(layer, "parametrizations") or hasattr(layer, "weight_g")))


def make_packed(layer: Any):
    """Makes a layer that the host has built a packed one in place.

    Other modules and packed layers stay as they are.
    """
    if not is_packable(layer):
        return
    layer_class = type(layer)
    mixin = next(mixin for base, mixin in _MIXINS.items() if issubclass(layer_class, base))
    if layer.weight is None:  # with dynamic VRAM the host makes the weights while it loads them
        sizes = layer.in_features, layer.out_features
        torch.nn.Linear.__init__(layer, *sizes, layer.comfy_need_lazy_init_bias,
                                 dtype=layer.weight_comfy_model_dtype)
    become_packed(layer, _packed_class(mixin, layer_class))


def become_packed(layer: Any, layer_class: type[PackedLayer]):
    """Gives a layer, in place, a class of packed layers with the same sizes."""
    keep_forward()
    layer.__class__ = layer_class
    layer.comfy_cast_weights = True
    layer._workspace = shared_workspace()
    layer.lora = None


@functools.cache
def _packed_class(mixin: type[PackedLayer], layer_class: type) -> type[PackedLayer]:
    return type(layer_class.__name__, (mixin, layer_class),
                {"new": (new_packed, (mixin.__name__, layer_class))})


@stable_pickle_name
def new_packed(mixin_name: str, layer_class: type) -> PackedLayer:
    """Returns an uninitialised layer of a class of `make_packed`."""
    mixin = next(mixin for mixin in _MIXINS.values() if mixin.__name__ == mixin_name)
    cls = _packed_class(mixin, layer_class)
    return cls.__new__(cls)
