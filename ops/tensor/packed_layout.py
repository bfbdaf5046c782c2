"""The bridge to comfy_kitchen: packed bytes as a tensor the host understands.

A packed tensor is a `QuantizedTensor` with the weight's logical shape and a float dtype, which
holds the bytes of the file. The host's model detection, memory accounting, offloading, pinned
buffers and state dicts work on it as on any tensor.
"""
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
)

from ..formats import plain  # the package registers every format
from ..formats._names import format_named
from ..formats.base import Format, FormatError
from ..formats.column_groups import TapsFirst
from ..formats.low_rank_and_joined import AddedLowRank, Joined, Scaled
from ..formats.row_layout import RowFamily
from ..formats.svdquant import ShiftedInput
from ..low_rank import balancing_powers
from ..stable_names import stable_pickle_name
from .packed_tensor import PackedTensor, relabel

# of the largest number of a factor that float16 holds with room for a sum
LEAST, MOST = 2.0**-10, 2.0**12

LAYOUT = "FeatherweightPacked"  # its name for the host; a bare one could be another pack's too


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedParams(BaseLayoutParams):
    """The logical dtype and shape of a packed tensor, its format and its quantisation parameters.

    Those, which the host moves and copies with the bytes, are named by the format's `qparams`, and
    None where it has no such tensor: see `RowLayout.qparams` and the formats made of others.
    """

    format: Format
    scale: torch.Tensor | None = None
    scale_factor: torch.Tensor | None = None
    scale_table: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    minimum_factor: torch.Tensor | None = None
    minimum_table: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None
    group_of_column: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    of_row: torch.Tensor | None = None
    of_column: torch.Tensor | None = None
    input_shift: torch.Tensor | None = None

    def _tensor_fields(self) -> list[str]:
        return [qparam.name for qparam in self.format.qparams]

    @property
    def qparams(self) -> list[torch.Tensor]:
        """The tensors of the weight next to its packed bytes, in the order of `Format.qparams`."""
        return [getattr(self, name) for name in self._tensor_fields()]


class PackedLayout(QuantizedLayout):
    """The one layout of packed tensors in the host's registry; their params have the format."""

    Params = PackedParams

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise FormatError(
            "A packed weight was about to be packed again, which would lose the patches in it."
            " Patches on packed weights are applied while the layer runs.")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: PackedParams) -> torch.Tensor:
        out = torch.empty(params.orig_shape, dtype=params.orig_dtype, device=qdata.device)
        return params.format.dequantize_into([qdata, *params.qparams], out)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor,
                           params: PackedParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


register_layout_class(LAYOUT, PackedLayout)


def packed_tensor(packed_format: Format, data: torch.Tensor, shape: Iterable[int],
                  dtype: torch.dtype = torch.float32, *qparams: torch.Tensor,
                  scale: torch.Tensor | None = None) -> PackedTensor:
    """Wraps the bytes of a packed weight, without copying them.

    Args:
        packed_format: the format of the bytes.
        data: uint8, contiguous, the blocks of the weight in row order, in any shape.
        shape: logical shape.
        dtype: the float dtype the tensor shows and dequantises to.
        qparams: the format's `qparams`, each of (qparam.length(blocks),).
        scale: the first of them, where that is easier to write; None: it is among `qparams`, or the
            format has none.

    Raises:
        FormatError: the number of bytes does not match `shape`.
    """
    shape, qparams = tuple(shape), qparams if scale is None else (scale, *qparams)
    values = torch.Size(shape).numel()
    blocks = -(-values // packed_format.block_length)
    counts = [qparam.length(blocks) for qparam in packed_format.qparams]
    if not (
        data.numel() == -(-values * packed_format.block_bytes // packed_format.block_length)
        and (counts or values % packed_format.block_length == 0)
        and list(map(len, qparams)) == counts
    ):
        count = data.numel() // packed_format.block_bytes * packed_format.block_length
        raise FormatError(
            f"{data.numel()} bytes of {packed_format.name} hold {count} values, not a weight of"
            f" shape {shape}."
        )
    names = [qparam.name for qparam in packed_format.qparams]
    params = PackedParams(orig_dtype=dtype, orig_shape=shape, format=packed_format,
                          **dict(zip(names, qparams)))
    return PackedTensor(data, LAYOUT, params)


def packed_rows(family: RowFamily, codes: torch.Tensor, shape: Iterable[int],
                sizes: Sequence[int | None] = (), **tensors: torch.Tensor) -> PackedTensor:
    """Makes a packed tensor, of float32, of a weight whose block is a row.

    Args:
        family: of the layout.
        codes: of one byte, in the order of the rows, in any shape.
        shape: logical shape (N, ...); a row is all that has the same first index.
        sizes: as `RowFamily.of_columns` takes them.
        tensors: what `RowLayout.qparams` names, in any shape; those that are held as bytes may have
            the dtype of their numbers.

    Raises:
        FormatError: names are missing or unknown, or a number of values does not fit `shape`.
    """
    shape = tuple(shape)
    packed_format = family.of_columns(torch.Size(shape[1:]).numel(), *sizes)
    expected = [qparam.name for qparam in packed_format.qparams]
    if tensors.keys() != set(expected):
        raise FormatError(f"a weight in {packed_format.name} was given {', '.join(tensors)};"
                          f" expected {', '.join(expected)}")
    data, *qparams = (
        tensor.contiguous().view(-1).view(dtype) for tensor, dtype in (
            (codes, torch.uint8),
            *((tensors[qparam.name], qparam.dtype) for qparam in packed_format.qparams)))
    return packed_tensor(packed_format, data, shape, torch.float32, *qparams)


def with_taps_first(tensor: PackedTensor, shape: Sequence[int]) -> PackedTensor:
    """Returns the packed kernel of a convolution from its taps; see `TapsFirst`.

    Args:
        tensor: (N, taps, C), whose blocks are rows.
        shape: of the kernel, (N, C, ...), as many taps.
    """
    packed_format = TapsFirst.of(tensor.params.format, tensor.shape[1])
    return packed_tensor(packed_format, tensor._qdata, shape, tensor.dtype, *tensor.params.qparams)


def with_low_rank(tensor: PackedTensor, up: torch.Tensor, down: torch.Tensor,
                  scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> PackedTensor:
    """Returns a packed weight plus the product of two factors; see `AddedLowRank`.

    Args:
        tensor: (N, K), whose blocks are rows.
        up: (N, R) of one of `FACTOR_DTYPES`.
        down: (R, K), likewise, in the basis of the codes if the format rotates them.
        scales: factors of the rows (N,) and of the columns (K,) of the product, float32.

    Raises:
        FormatError: the factors do not fit the weight.
    """
    base = tensor.params.format
    data, *qparams = packed_tensors(tensor)
    rows = data.numel() // base.block_bytes
    if (up.ndim, down.ndim) != (2, 2) or (len(up), down.shape[1]) != (rows, base.block_length) or (
            up.shape[1] != len(down)):
        raise FormatError(f"factors of {tuple(up.shape)} and {tuple(down.shape)} do not make a"
                          f" weight of {rows} x {base.block_length}")
    up, down = _within_float16(up, down, scales)
    packed_format = AddedLowRank.of(base, len(down), up.dtype, down.dtype, scales is not None)
    factors = [factor.contiguous().view(-1).view(torch.uint8) for factor in (up, down)]
    return packed_tensor(
        packed_format, data, tensor.shape, tensor.dtype, *qparams, *factors, *(scales or ()))


def with_input_shift(tensor: PackedTensor, shift: torch.Tensor) -> PackedTensor:
    """Returns a packed weight with what a shift of its input adds; see `ShiftedInput`.

    Args:
        tensor: (N, K), whose blocks are rows.
        shift: float32 (N,).
    """
    return packed_tensor(ShiftedInput.of(tensor.params.format), tensor._qdata, tensor.shape,
                         tensor.dtype, *tensor.params.qparams, shift)


def _within_float16(up: torch.Tensor, down: torch.Tensor,
                    scales: tuple[torch.Tensor, torch.Tensor] | None
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Balances the factors of a product where a model in float16 could not hold one of them.

    They keep their dtypes, and the product its values.
    """
    effective = up, down
    if scales is not None:
        effective = up.float() * scales[0].unsqueeze(1), down.float() * scales[1]
    if all(LEAST <= factor.abs().amax() <= MOST for factor in effective if factor.numel()):
        return up, down
    power, inverse = balancing_powers(*(factor.float() for factor in effective))
    return (up * inverse).to(up.dtype), (down * power[:, None]).to(down.dtype)


def scale_packed(tensor: PackedTensor, of_rows: torch.Tensor,
                 of_columns: torch.Tensor | None = None) -> PackedTensor:
    """Returns a packed weight times numbers that stand beside it in its file; see `Scaled`.

    Args:
        tensor: (N, ...) in blocks that divide a row.
        of_rows: a factor of each row (N,), or one.
        of_columns: a factor of each column (K,), or None.

    Raises:
        FormatError: the factors do not fit the weight, or its blocks do not divide its rows.
    """
    base, columns = tensor.params.format, tensor.shape[1:].numel()
    if columns % base.block_length:
        raise FormatError(f"its rows of {columns} values are not whole blocks")
    if of_rows.numel() not in (1, len(tensor)) or (
            of_columns is not None and of_columns.numel() != columns):
        raise FormatError(f"factors of {tuple(of_rows.shape)} do not scale {tuple(tensor.shape)}")
    packed_format = Scaled.of(base, columns, of_columns is not None)
    qparams = [of_rows.float().flatten().expand(len(tensor)).contiguous()]
    if of_columns is not None:
        qparams.append(of_columns.float().flatten().contiguous())
    data, *own = packed_tensors(tensor)
    return packed_tensor(packed_format, data, tensor.shape, tensor.dtype, *own, *qparams)


def join_packed(parts: Sequence[PackedTensor], axis: int) -> PackedTensor:
    """Joins packed weights of any formats, whose rows are whole blocks, into one; see `Joined`.

    Args:
        parts: (N_i, K) for rows, (N, K_i) for columns.
        axis: 0 to join rows, 1 to join columns.
    """
    packed_format = Joined.of(axis, *((part.params.format, *part.shape) for part in parts))
    size = sum(part.shape[axis] for part in parts)
    shape = (size, parts[0].shape[1]) if axis == 0 else (len(parts[0]), size)
    data = torch.zeros(
        shape[0] * packed_format.block_bytes, dtype=torch.uint8, device=parts[0].device)
    for place, part in zip(packed_format.parts, parts):
        for target, tensor in zip(place.tensors(data), packed_tensors(part)):
            target.copy_(tensor.reshape(-1))
    return packed_tensor(packed_format, data, shape, parts[0].dtype)


def pack_16bit(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Packs a plain weight of 16-bit numbers for a layer; returns other weights in `dtype`.

    Patches on a packed weight run as a branch: added to 16-bit numbers and rounded, a weak one
    would be lost. A layer of float32 keeps 16-bit numbers as they are.

    Args:
        weight: a plain tensor of any float dtype.
        dtype: of the layer's parameters.
    """
    if dtype != torch.float32 or weight.dtype not in plain.PLAIN_FORMATS:
        weight = weight.to(dtype)
    return _pack_numbers(weight, dtype) if weight.dtype in plain.PLAIN_FORMATS else weight


def _pack_numbers(numbers: torch.Tensor, dtype: torch.dtype) -> PackedTensor:
    data = numbers.contiguous().view(-1).view(torch.uint8)
    return packed_tensor(plain.PLAIN_FORMATS[numbers.dtype], data, numbers.shape, dtype)


def plain_dtype_of(weight: torch.Tensor) -> torch.dtype | None:
    """Returns the dtype of a weight's numbers, packed 16 bits as plain ones; None for a quantised
    weight."""
    if is_packed(weight):
        return weight.params.format.plain_dtype
    return None if isinstance(weight, QuantizedTensor) else weight.dtype


def plain_tensor(weight: torch.Tensor) -> torch.Tensor:
    """Returns the numbers of a weight that has a `plain_dtype_of`, a view where they are packed."""
    dtype = plain_dtype_of(weight)
    if dtype is None or not is_packed(weight):
        return weight
    return packed_tensors(weight)[0].contiguous().view(dtype).view(weight.shape)


def is_other_16bit(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a weight, packed or plain, is of 16-bit numbers of another dtype."""
    held = plain_dtype_of(weight)
    return held != dtype and {held, dtype} <= plain.PLAIN_FORMATS.keys()


def convert_16bit(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight of `is_other_16bit` in `dtype`, packed as before."""
    numbers = plain_tensor(weight).to(dtype)
    return _pack_numbers(numbers, weight.dtype) if is_packed(weight) else numbers


def packed_tensors(tensor: PackedTensor) -> list[torch.Tensor]:
    """Returns the bytes of a packed tensor, and its `qparams`."""
    params = tensor._params
    tensors = [tensor._qdata]
    for qparam in params.format.qparams:
        tensors.append(getattr(params, qparam.name))
    return tensors


def is_packed(tensor) -> TypeGuard[PackedTensor]:
    """Returns whether a tensor is packed; the host's own quantised tensors are not."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def is_comfy_quantized(tensor) -> TypeGuard[QuantizedTensor]:
    """Returns whether a tensor is in one of ComfyUI's own quantised formats, and not packed."""
    return isinstance(tensor, QuantizedTensor) and not is_packed(tensor)


class PickledWeight:
    """Pickles a parameter of a layer: a packed one as bytes; by itself a tensor goes dense."""

    def __init__(self, param: torch.nn.Parameter):
        self._param = param

    def __reduce__(self):
        weight = self._param
        if not isinstance(weight, QuantizedTensor):
            return torch.nn.Parameter, (_own_memory(weight), weight.requires_grad)
        if not is_packed(weight):
            return host_weight, (weight._qdata, weight._layout_cls, weight._params)
        tensors = [_own_memory(tensor) for tensor in packed_tensors(weight)]
        return packed_weight, (weight.params.format, tuple(weight.shape), weight.dtype, *tensors)


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor that is part of a larger storage, all of which a pickle would contain."""
    tensor = tensor.detach()
    if tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


@stable_pickle_name
def packed_weight(packed_format: Format | str, shape: Iterable[int], dtype: torch.dtype,
                  data: torch.Tensor, *qparams: torch.Tensor) -> torch.nn.Parameter:
    """Returns a packed weight from a pickle, where version 0.2.1 has its format's name; see
    `packed_tensor`."""
    if isinstance(packed_format, str):
        packed_format = format_named(packed_format)
    tensor = packed_tensor(packed_format, data, shape, dtype, *qparams)
    return torch.nn.Parameter(tensor, requires_grad=False)


@stable_pickle_name
def host_weight(*parts) -> torch.nn.Parameter:
    """Returns a weight in one of the host's formats from a pickle."""
    return torch.nn.Parameter(QuantizedTensor(*parts), requires_grad=False)


def safe_detach(tensor: torch.Tensor) -> torch.Tensor:
    """Detaches a tensor, in inference mode also a quantised one that was made outside of it."""
    return relabel(tensor) if isinstance(tensor, QuantizedTensor) else tensor.detach()


def for_state_dict(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor for a state dict; a quantised one, the host's too, as a `PackedTensor`.

    The result shares the tensor's memory.
    """
    if not isinstance(tensor, QuantizedTensor):
        return tensor.detach()
    return PackedTensor(tensor._qdata, tensor._layout_cls, dataclasses.replace(tensor._params))


def reshape_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Gives `value` a shape that has its dimensions merged or split, or others of size 1.

    C programs drop leading ones and merge the dimensions of kernels that have more than four.

    Returns:
        `value` itself where its shape is not such a one.
    """
    if value.shape == shape or not _is_same_but_merged(value.shape, shape):
        return value
    if is_packed(value):
        return relabel(value, shape=shape)
    return value.reshape(shape)


def _is_same_but_merged(first: Sequence[int], second: Sequence[int]) -> bool:
    short, long = sorted(([n for n in shape if n != 1] for shape in (first, second)), key=len)
    if len(short) == len(long) or len(short) < 2 or 0 in long:
        return short == long
    sizes = iter(long)
    for size in short:
        merged = 1
        while merged < size:
            merged *= next(sizes, size + 1)
        if merged != size:
            return False
    return next(sizes, None) is None
