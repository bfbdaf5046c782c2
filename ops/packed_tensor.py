"""`PackedTensor`: the quantised tensor that nodes may handle like any other.

What a node does to it gives what the dense tensor of its values gives, or one sentence that says
why it cannot, and never a lost write or the end of the process.
"""
import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import torch
from comfy_kitchen.tensor import QuantizedTensor

if TYPE_CHECKING:
    from .packed_layout import PackedLayout, PackedParams

_aten = torch.ops.aten
_TO_WRITE = "give the layer a new Parameter made from its `dequantize()`, or add a patch to the model, as LoRA nodes do"
_TO_SAVE = (
    "save the model with a node that saves models (ComfyUI's or KJNodes'), or take the dense"
    " tensor that its `dequantize()` gives")


class PackedTensor(QuantizedTensor):
    """A quantised tensor that can be read as the dense one it stands for, and neither written to
    nor read as memory.

    Copies, moves and other float dtypes stay packed; every other operation gives dense values,
    views as `DensePart`. Raises NotImplementedError, as torch does for tensors without memory of
    their own, for whatever writes to the values or asks for their address: memory of the dense
    size, which is what others would read there, does not exist.
    """

    if TYPE_CHECKING:

        @property
        def layout_cls(self) -> type[PackedLayout]: ...

        @property
        def params(self) -> PackedParams: ...

    # operations give what the dispatch below gives
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, qdata, layout_cls, params):
        tensor = QuantizedTensor.__new__(cls, qdata, layout_cls, params)
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # compiled code would read at the address 0
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        run = super().__torch_dispatch__
        if func is _aten.detach.default:
            with torch.inference_mode(args[0].is_inference()):  # torch takes no other for a view
                return relabel(args[0])
        if func is _aten.copy_.default:
            target, source = args[:2]
            if not isinstance(target, QuantizedTensor):
                return func(target, source.dequantize(), *args[2:], **kwargs)
            _check_copy(target, source)
        elif func is _aten._has_compatible_shallow_copy_type.default:
            # no plain tensor takes this for its memory
            return all(isinstance(tensor, QuantizedTensor) for tensor in args)
        elif _writes(func):
            if any(
                    isinstance(tensor, QuantizedTensor)
                    for tensor in _written(func._schema, args, kwargs)):
                raise _refusal(f"{func._schema.name.removeprefix('aten::')} would write to",
                               _TO_WRITE)
        elif func.overloadpacket in (_aten.to, _aten._to_copy) and not all(
            value.is_floating_point
            for value in (*args, *kwargs.values())
            if isinstance(value, torch.dtype)
        ):
            return cls._dequant_and_fallback(func, args, kwargs)
        elif _views(func):
            with _mode_of(args[0]):
                return _parts(run(func, types, args, kwargs))
        return run(func, types, args, kwargs)

    def _copy_with(self, qdata=None, params=None, clone_params=True):
        if params is None:
            params = self._params.clone() if clone_params else self._params
        return PackedTensor(self._qdata if qdata is None else qdata, self._layout_cls, params)

    @staticmethod
    def __tensor_unflatten__(inner_tensors, context, outer_size, outer_stride):
        quantised = QuantizedTensor.__tensor_unflatten__(inner_tensors, context, outer_size,
                                                         outer_stride)
        return PackedTensor(quantised._qdata, quantised._layout_cls, quantised._params)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales: the host counts memory by it."""
        return sum(tensor.nbytes for tensor in self._inner)

    @property
    def _inner(self) -> list[torch.Tensor]:
        return [
            self._qdata, *(getattr(self._params, field) for field in self._params._tensor_fields())
        ]

    # --- reading ---

    def numpy(self, **kwargs):
        """The values as an array of its own. It is read-only, since a write would not come back
        here."""
        return _read_only_array(self.dequantize(), kwargs)

    def tolist(self):
        return self.dequantize().tolist()

    def is_pinned(self, device=None) -> bool:
        return self._qdata.is_pinned()

    def is_shared(self) -> bool:
        return all(tensor.is_shared() for tensor in self._inner)

    def record_stream(self, stream):
        for tensor in self._inner:
            tensor.record_stream(stream)

    # --- copies ---

    def __copy__(self):
        return _parameter_like(self, self.detach())

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _parameter_like(self, self.detach().clone())
        return copied

    def __reduce_ex__(self, protocol):
        """Files and other processes get the dense tensor, which needs nothing of ours to be
        read."""
        return _parameter_like(self, self.dequantize()).__reduce_ex__(protocol)

    # --- what would write, or read memory ---

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, QuantizedTensor):
            raise _refusal("an assignment to its `data` would write to", _TO_WRITE)
        torch.Tensor.data.__set__(self, value)  # dtype and device
        self._qdata, self._layout_cls, self._params = value._qdata, value._layout_cls, value._params

    @property
    def real(self):
        return self

    @real.setter
    def real(self, value):
        raise _refusal("an assignment to its `real` would write to", _TO_WRITE)

    def detach_(self):
        return self  # it is part of no graph

    _storage = None

    def untyped_storage(self):
        if self._storage is None:
            self._storage = _NoMemory(self.numel() * self.element_size(), device="meta")
        return self._storage


class DensePart(torch.Tensor):
    """A view of a packed tensor, as slices, `t()`, `view` and the like give it: its dense values,
    in memory of their own.

    Since a write there would not reach the weight, it raises NotImplementedError, and so do views
    of it. What is computed from it is a plain tensor, and so is what conversions and copies give. A
    Parameter that is made of it is whoever made it's own.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        part = torch.Tensor._make_subclass(cls, values)
        part._values = values  # the same memory as a plain tensor
        return part

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _aten._has_compatible_shallow_copy_type.default:
            return False  # no other tensor takes its place, nor it another's
        if _writes(func) and any(
            isinstance(tensor, cls) and not _is_parameter(tensor)
            for tensor in _written(func._schema, args, kwargs)
        ):
            raise _refusal(f"{func._schema.name.removeprefix('aten::')} would write to", _TO_WRITE)
        plain_args, plain_kwargs = torch.utils._pytree.tree_map_only(cls, lambda part: part._values,
                                                                     (args, kwargs))
        if _writes(func) or not _views(func) or _is_parameter(args[0]):
            return func(*plain_args, **plain_kwargs)
        with _mode_of(args[0]):
            return _parts(func(*plain_args, **plain_kwargs))

    def __copy__(self):
        return _parameter_like(self, self.detach())

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _parameter_like(self, self._values.clone())
        return copied

    def __reduce_ex__(self, protocol):
        return _parameter_like(self, self._values).__reduce_ex__(protocol)

    def __repr__(self, **kwargs):
        return self._values.__repr__(**kwargs)

    def numpy(self, **kwargs):
        return _read_only_array(self._values, kwargs)

    def tolist(self):
        return self._values.tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not _is_parameter(self):
            raise _refusal("an assignment to the `data` of a part of it would write to", _TO_WRITE)
        torch.Tensor.data.__set__(self, value)
        self._values = value


def _of_plain_values(name: str):
    def method(self, *args, **kwargs):
        return getattr(self._values, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
              "contiguous", "__dlpack__"):
    setattr(DensePart, _name, _of_plain_values(_name))


def _parts(values):
    """What an operation gave, with each plain tensor as a part; those of torch.compile stay as they
    are."""
    if isinstance(values, (list, tuple)):
        return type(values)(map(_parts, values))
    return DensePart(values) if type(values) is torch.Tensor else values


def _is_parameter(tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _parameter_like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(values, tensor.requires_grad) if _is_parameter(tensor) else values


def _read_only_array(values: torch.Tensor, kwargs: dict):
    array = values.numpy(**kwargs)
    array.flags.writeable = False
    return array


def relabel(tensor: PackedTensor, dtype: torch.dtype | None = None,
               shape=None) -> PackedTensor:
    """The same bytes under another logical dtype or shape. `tensor.to(dtype)` would copy them."""
    params = tensor._params
    params = dataclasses.replace(params, orig_dtype=dtype or params.orig_dtype,
                                 orig_shape=tuple(shape or params.orig_shape))
    return type(tensor)(tensor._qdata, tensor._layout_cls, params)


@functools.cache
def _writes(func) -> bool:
    return func._schema.is_mutable


@functools.cache
def _views(func) -> bool:
    return any(value.alias_info for value in func._schema.returns)


def _mode_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The mode in which torch takes what is made for a view of `tensor`."""
    return (
        torch.inference_mode(tensor.is_inference())
        if torch.is_inference_mode_enabled()
        else contextlib.nullcontext()
    )


def _written(schema, args, kwargs):
    """The arguments that an operator writes to."""
    for index, argument in enumerate(schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _check_copy(target: QuantizedTensor, source):
    """Raise NotImplementedError where `target.copy_(source)` cannot copy the bytes."""
    if not isinstance(source, QuantizedTensor) or (source._layout_cls, source.shape) != (
        target._layout_cls,
        target.shape,
    ):
        raise _refusal("copy_ from a tensor that is not packed alike would write to", _TO_WRITE)
    if isinstance(target, PackedTensor) and not all(map(_is_writable, target._inner)):
        raise _refusal("copy_ would write to the file itself, beside", _TO_WRITE)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether torch made the memory itself. Writing into the pages of a file, which come from
    outside, ends the process."""
    return tensor.device.type != "cpu" or tensor.untyped_storage().resizable()


def _refusal(what: str, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"A weight is held packed, in the bytes of its file, and {what} its dense values, which"
        f" lie nowhere; {instead}."
    )


def _refusing(name: str, what: str, instead: str):
    def method(self, *args, **kwargs):
        raise _refusal(f"{name} {what}", instead)

    method.__name__ = name
    return method


_OPERATORS = (
    "add",
    "and",
    "div",
    "floordiv",
    "lshift",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)
_IN_PLACE = {
    *(name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")),
    *(f"__i{operator}__" for operator in _OPERATORS),
} - {"copy_", "detach_", "requires_grad_"}
for _name in _IN_PLACE:
    setattr(PackedTensor, _name, _refusing(_name, "would write to", _TO_WRITE))
PackedTensor.__setitem__ = _refusing("an assignment to a part of it", "would write to", _TO_WRITE)
for _name in ("data_ptr", "const_data_ptr", "storage", "_typed_storage", "__dlpack__",
              "share_memory_"):
    setattr(PackedTensor, _name, _refusing(_name, "asks for the memory of", _TO_SAVE))


class _NoMemory(torch.UntypedStorage):
    """The storage of a packed tensor: it says how large it would be, which torch.compile asks, and
    has no memory."""


_HARMLESS = (
    "_cdata",
    "_expired",
    "_fix_weakref",
    "_free_weak_ref",
    "_shared_decref",
    "_weak_ref",
    "device",
    "element_size",
    "is_cuda",
    "is_hpu",
    "is_pinned",
    "is_shared",
    "is_sparse",
    "is_sparse_csr",
    "nbytes",
    "resizable",
    "size",
    "type",
    "untyped",
)
for _name in (*(name for name in dir(torch.UntypedStorage) if not name.startswith("__")),
              "__copy__", "__deepcopy__", "__getitem__", "__iter__", "__reduce_ex__", "__repr__",
              "__setitem__", "__str__"):
    if _name not in (*_HARMLESS, *vars(_NoMemory)):
        setattr(_NoMemory, _name,
                _refusing(f"{_name} of its storage", "asks for the memory of", _TO_SAVE))
