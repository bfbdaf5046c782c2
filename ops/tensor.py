"""The bridge to comfy_kitchen: packed bytes as a tensor the host understands.

A packed tensor is a `QuantizedTensor` with the weight's logical shape and a float dtype, around the bytes of the file.
The host's model detection, memory accounting, offloading, pinned buffers and state dicts work on it as on any tensor.
"""
import dataclasses

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class

from . import formats  # noqa: F401  registers every format
from .format import FORMATS, Format, FormatError


@dataclasses.dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """Logical dtype and shape of a packed tensor. Everything else lies in its bytes, so `scale` is None."""

    def _tensor_fields(self) -> list[str]:
        return []


class PackedLayout(QuantizedLayout):
    """The layout every packed format shares; one subclass per format is generated below."""

    Params = PackedParams
    format: type[Format]

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise FormatError(
            f"A weight in {cls.format.__name__} was about to be packed again, which would lose what was added to it."
            " Patches on packed weights are applied while the layer runs."
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: PackedParams) -> torch.Tensor:
        out = torch.empty(params.orig_shape, dtype=params.orig_dtype, device=qdata.device)
        return cls.format.unpack_into(qdata, out)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: PackedParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


def layout_name(packed_format: type[Format]) -> str:
    """Name of a format's layout in comfy_kitchen's registry, where a bare name could overwrite someone else's."""
    return f"Featherweight{packed_format.__name__}"


for _format in FORMATS.values():
    register_layout_class(layout_name(_format), type(layout_name(_format), (PackedLayout,), {"format": _format}))


def packed_tensor(packed_format: type[Format], data: torch.Tensor, shape, dtype=torch.float32) -> QuantizedTensor:
    """Wrap the bytes of a packed weight, without copying them.

    data: uint8, contiguous, the blocks of the weight in row order, in any shape. shape: logical shape. dtype: the float
    dtype the tensor shows and unpacks to. Raises FormatError when the bytes are not those of `shape`.
    """
    shape = tuple(shape)
    values = data.numel() // packed_format.block_bytes * packed_format.block_length
    if data.numel() % packed_format.block_bytes or values != torch.Size(shape).numel():
        raise FormatError(
            f"{data.numel()} bytes of {packed_format.__name__} hold {values} values, not a weight of shape {shape}."
        )
    return QuantizedTensor(data, layout_name(packed_format), PackedParams(None, dtype, shape))


def is_packed(tensor) -> bool:
    """Whether a tensor is one of ours (the host has quantised tensors of its own)."""
    return isinstance(tensor, QuantizedTensor) and issubclass(tensor.layout_cls, PackedLayout)


def relabelled(tensor: QuantizedTensor, dtype: torch.dtype | None = None, shape=None) -> QuantizedTensor:
    """The same bytes under another logical dtype or shape. `tensor.to(dtype)` would copy them."""
    params = tensor._params
    params = dataclasses.replace(params, orig_dtype=dtype or params.orig_dtype, orig_shape=tuple(shape or params.orig_shape))
    return QuantizedTensor(tensor._qdata, tensor._layout_cls, params)
