"""The bridge to comfy_kitchen: packed bytes as a tensor the host understands.

A packed tensor is a `QuantizedTensor` with the weight's logical shape and a float dtype, around the
bytes of the file. The host's model detection, memory accounting, offloading, pinned buffers and
state dicts work on it as on any tensor.
"""
import dataclasses
from typing import TypeGuard

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
)

from .format import Format, FormatError
from .formats import plain  # the package registers every format
from .formats._names import format_named
from .packed_tensor import PackedTensor, relabel
from .pickle_names import stable_pickle_name


@dataclasses.dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """Logical dtype and shape of a packed tensor. `scale`: the scales of formats that keep them
    apart from the codes (NF4's absmax, float32), None for those whose blocks hold them."""

    def _tensor_fields(self) -> list[str]:
        return [] if self.scale is None else ["scale"]


class PackedLayout(QuantizedLayout):
    """The layout every packed format shares; one subclass per format is generated below."""

    Params = PackedParams
    format: type[Format]

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise FormatError(
            f"A weight in {cls.format.__name__} was about to be packed again, which would lose"
            " what was added to it. Patches on packed weights are applied while the layer runs.")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: PackedParams) -> torch.Tensor:
        out = torch.empty(params.orig_shape, dtype=params.orig_dtype, device=qdata.device)
        return cls.format.dequantize_into(
            [qdata] if params.scale is None else [qdata, params.scale], out)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor,
                           params: PackedParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


def layout_name(packed_format: type[Format]) -> str:
    """Name of a format's layout in comfy_kitchen's registry, where a bare name could overwrite
    someone else's."""
    name = f"Featherweight{packed_format.__name__}"
    if name not in _layouts:
        _layouts[name] = type(name, (PackedLayout,), {"format": packed_format})
        register_layout_class(name, _layouts[name])
    return name


_layouts: dict[str, type[PackedLayout]] = {}


def packed_tensor(packed_format: type[Format], data: torch.Tensor, shape, dtype=torch.float32,
                  scale: torch.Tensor | None = None) -> PackedTensor:
    """Wrap the bytes of a packed weight, without copying them.

    data: uint8, contiguous, the blocks of the weight in row order, in any shape. shape: logical
    shape. dtype: the float dtype the tensor shows and dequantises to. scale: float32 (blocks,) for
    formats that keep scales apart. Raises FormatError when the bytes are not those of `shape`.
    """
    shape = tuple(shape)
    values = torch.Size(shape).numel()
    blocks = -(-values // packed_format.block_length)
    if scale is None:
        fits = (
            values % packed_format.block_length == 0
            and data.numel() == blocks * packed_format.block_bytes
        )
    else:
        fits = (
            data.numel() == -(-values * packed_format.block_bytes // packed_format.block_length)
            and len(scale) == blocks
        )
    if not fits:
        held = data.numel() // packed_format.block_bytes * packed_format.block_length
        raise FormatError(
            f"{data.numel()} bytes of {packed_format.__name__} hold {held} values, not a weight of"
            f" shape {shape}."
        )
    return PackedTensor(data, layout_name(packed_format), PackedParams(scale, dtype, shape))


def pack_16bit(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A plain weight for a layer whose parameters are of `dtype`: packed where its numbers have 16
    bits, else as it is.

    16-bit numbers stay as they are for a layer of float32. In all dtypes patches then run beside
    the product: added to such a weight and rounded, a weak one would be lost.
    """
    if dtype != torch.float32 or weight.dtype not in plain.BY_DTYPE:
        weight = weight.to(dtype)
    packed_format = plain.BY_DTYPE.get(weight.dtype)
    if packed_format is None:
        return weight
    return packed_tensor(packed_format,
                         weight.contiguous().view(-1).view(torch.uint8), weight.shape, dtype)


def packed_tensors(tensor: PackedTensor) -> list[torch.Tensor]:
    """What a packed tensor holds: its bytes and, where the format keeps them apart, its scales."""
    return (
        [tensor._qdata] if tensor._params.scale is None else [tensor._qdata, tensor._params.scale]
    )


def is_packed(tensor) -> TypeGuard[PackedTensor]:
    """Whether a tensor is one of ours (the host has quantised tensors of its own)."""
    return isinstance(tensor, QuantizedTensor) and issubclass(tensor.layout_cls, PackedLayout)


def select_packed(tensor: PackedTensor, index: int) -> PackedTensor:
    """`tensor[index]`, which shares the bytes. What it holds must be whole blocks."""
    packed_format, shape = tensor.layout_cls.format, tensor.shape[1:]
    data, *scale = packed_format.rows(packed_tensors(tensor), shape.numel(),
                                      slice(index, index + 1))
    return packed_tensor(packed_format, data, shape, tensor.dtype, *scale)


class PickledWeight:
    """A parameter on its way into the pickle of its layer: a packed one as its bytes, where a
    tensor by itself goes dense."""

    def __init__(self, param: torch.nn.Parameter):
        self._param = param

    @classmethod
    def of(cls, param: torch.nn.Parameter | None) -> "PickledWeight | None":
        return None if param is None else cls(param)

    def __reduce__(self):
        weight = self._param
        if not isinstance(weight, QuantizedTensor):
            return torch.nn.Parameter, (_alone(weight), weight.requires_grad)
        if not is_packed(weight):
            return host_weight, (weight._qdata, weight._layout_cls, weight._params)
        tensors = [_alone(tensor) for tensor in packed_tensors(weight)]
        return packed_weight, (
            weight.layout_cls.format.__name__,
            tuple(weight.shape),
            weight.dtype,
            *tensors,
        )


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in memory of its own: what is pickled of one in a mapped file is the file."""
    tensor = tensor.detach()
    return (
        tensor
        if tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
        else tensor.clone()
    )


@stable_pickle_name
def packed_weight(format_name: str, shape, dtype: torch.dtype, data: torch.Tensor, *scale:
                  torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(packed_tensor(format_named(format_name), data, shape, dtype, *scale),
                              requires_grad=False)


@stable_pickle_name
def host_weight(*parts) -> torch.nn.Parameter:
    """A weight in a format of the host."""
    return torch.nn.Parameter(QuantizedTensor(*parts), requires_grad=False)


def safe_detach(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor.detach()`, which fails in inference mode with a quantised tensor that was made
    outside of it."""
    return relabel(tensor) if isinstance(tensor, QuantizedTensor) else tensor.detach()


def for_state_dict(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` for a state dict: a quantised one, the host's too, as a `PackedTensor` that shares
    its memory."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor.detach()
    return PackedTensor(tensor._qdata, tensor._layout_cls, dataclasses.replace(tensor._params))


def squeeze_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`value` with the dimensions of size 1 that files add or drop (pad tokens, 1x1 convolutions)
    as in `shape`."""
    if value.shape == shape or [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        return value
    if is_packed(value):
        return relabel(value, shape=shape)
    return value.reshape(shape)
