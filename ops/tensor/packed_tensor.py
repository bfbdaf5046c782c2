"""`PackedTensor`: the quantised tensor that nodes may handle like any other.

An operation on it gives what the dense tensor of its values gives, or raises an error that says why
it cannot. It never loses a write and never crashes the process.
"""
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from .packed_layout import PackedLayout, PackedParams

_aten = torch.ops.aten
_TO_WRITE = (
    "give the layer a new Parameter made from its `dequantize()`, or add a patch to the model, as"
    " LoRA nodes do")
_TO_SAVE = (
    "save the model with a node that saves models (ComfyUI's or KJNodes'), or use the dense tensor"
    " that its `dequantize()` returns")
# Attribute of a storage by which newer hosts find the file that it is mapped from: on a fast disk
# they stream such weights and pin none.
SOURCE_PATH = "_comfy_source_path"
_Quantized = TypeVar("_Quantized", bound=QuantizedTensor)


class PackedTensor(QuantizedTensor):
    """A quantised tensor that reads like a dense one, and cannot be written to.

    Copies, moves and other float dtypes stay packed; every other operation gives dense values,
    views as `DensePart`.

    Raises:
        NotImplementedError: something writes to the values or takes their address, since memory of
            the dense size does not exist. torch raises the same for tensors without storage.
    """

    if TYPE_CHECKING:

        @property
        def layout_cls(self) -> type[PackedLayout]: ...

        @property
        def params(self) -> PackedParams: ...

    # operations go straight to the dispatch below
    __torch_function__ = (  # pyright: ignore[reportAssignmentType]
        torch._C._disabled_torch_function_impl)

    @staticmethod
    def __new__(cls, qdata, layout_cls, params):
        tensor = QuantizedTensor.__new__(cls, qdata, layout_cls, params)
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # compiled code would read at address 0
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        run = super().__torch_dispatch__
        if func is _aten.detach.default:
            # torch wants a view to be of the same mode
            with torch.inference_mode(args[0].is_inference()):
                return relabel(args[0])
        if func is _aten.copy_.default:
            target, source = args[:2]
            if not isinstance(target, QuantizedTensor):
                return func(target, source.dequantize(), *args[2:], **kwargs)
            _check_copy(target, source)
        elif func is _aten._has_compatible_shallow_copy_type.default:
            # a plain tensor cannot take over this one's memory
            return all(isinstance(tensor, QuantizedTensor) for tensor in args)
        elif _writes(func):
            written = _written(func._schema, args, kwargs)
            if any(isinstance(tensor, QuantizedTensor) for tensor in written):
                raise _write_error(func)
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
        tensor = QuantizedTensor.__tensor_unflatten__(inner_tensors, context, outer_size,
                                                      outer_stride)
        return PackedTensor(tensor._qdata, tensor._layout_cls, tensor._params)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales. The host counts memory by it."""
        return sum(tensor.nbytes for tensor in inner_tensors(self))

    # --- reading ---

    def numpy(self, **kwargs):
        """Returns the values as a new array, read-only since a write would not come back here."""
        return _read_only_array(self.dequantize(), kwargs)

    def tolist(self):
        return self.dequantize().tolist()

    def is_pinned(self, device=None) -> bool:
        return self._qdata.is_pinned()

    def is_shared(self) -> bool:
        return all(tensor.is_shared() for tensor in inner_tensors(self))

    def record_stream(self, stream):
        for tensor in inner_tensors(self):
            tensor.record_stream(stream)

    # --- copies ---

    def __copy__(self):
        return _parameter_like(self, self.detach())

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _parameter_like(self, self.detach().clone())
        return copied

    def __reduce_ex__(self, protocol):
        """Pickles the dense tensor, so that files and other processes can read it without us."""
        return _parameter_like(self, self.dequantize()).__reduce_ex__(protocol)

    # --- writing, and reading memory ---

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, QuantizedTensor):
            raise _refusal("an assignment to its `data` would write to", _TO_WRITE)
        _set_data(self, value)  # dtype and device
        self._qdata = value._qdata
        self._layout_cls = value._layout_cls
        self._params = value._params

    @property
    def real(self):
        return self

    @real.setter
    def real(self, value):
        raise _refusal("an assignment to its `real` would write to", _TO_WRITE)

    def detach_(self):
        return self  # it is never part of a graph

    _storage = None

    def untyped_storage(self):
        if self._storage is None:
            self._storage = _NoMemory(self.numel() * self.element_size(), device="meta")
            path = getattr(self._qdata.untyped_storage(), SOURCE_PATH, None)
            if path is not None:
                setattr(self._storage, SOURCE_PATH, path)
        return self._storage


class DensePart(torch.Tensor):
    """The dense values of a view of a packed tensor (a slice, `t()`, `view` ...), in new memory.

    A write to it or to a view of it would not reach the weight and raises NotImplementedError.
    Results of computations, conversions and copies are plain tensors. A Parameter made from it may
    be written to.
    """

    __torch_function__ = (  # pyright: ignore[reportAssignmentType]
        torch._C._disabled_torch_function_impl)

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        part = torch.Tensor._make_subclass(cls, values)
        part._dense = values  # a plain tensor of the same memory
        return part

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _aten._has_compatible_shallow_copy_type.default:
            return False  # it cannot replace another tensor, nor be replaced
        if _writes(func) and any(
            isinstance(tensor, cls) and not _is_parameter(tensor)
            for tensor in _written(func._schema, args, kwargs)
        ):
            raise _write_error(func)
        plain_args, plain_kwargs = tree_map_only(cls, lambda part: part._dense, (args, kwargs))
        if _writes(func) or not _views(func) or _is_parameter(args[0]):
            return func(*plain_args, **plain_kwargs)
        with _mode_of(args[0]):
            return _parts(func(*plain_args, **plain_kwargs))

    def __copy__(self):
        return _parameter_like(self, self.detach())

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = _parameter_like(self, self._dense.clone())
        return copied

    def __reduce_ex__(self, protocol):
        return _parameter_like(self, self._dense).__reduce_ex__(protocol)

    def __repr__(self, **kwargs):
        return self._dense.__repr__(**kwargs)

    def numpy(self, **kwargs):
        return _read_only_array(self._dense, kwargs)

    def tolist(self):
        return self._dense.tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not _is_parameter(self):
            raise _refusal("an assignment to the `data` of a part of it would write to", _TO_WRITE)
        _set_data(self, value)
        self._dense = value


def _set_data(tensor: torch.Tensor, value: torch.Tensor):
    """Assigns `tensor.data` as torch itself does, past the properties above."""
    torch.Tensor.data.__set__(tensor, value)  # pyright: ignore[reportAttributeAccessIssue]


def _dense_method(name: str) -> Callable:
    """Makes a method that runs on the dense values of a part."""
    def method(self, *args, **kwargs):
        return getattr(self._dense, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
              "contiguous", "__dlpack__"):
    setattr(DensePart, _name, _dense_method(_name))


def _parts(values):
    """Turns each plain tensor of an operation's result into a part, but not torch.compile's own."""
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


def inner_tensors(tensor: QuantizedTensor) -> list[torch.Tensor]:
    """Returns the plain tensors of a quantised one, ours or the host's: codes, then scales."""
    params = tensor._params
    return [tensor._qdata, *(getattr(params, name) for name in params._tensor_fields())]


def relabel(tensor: _Quantized, dtype: torch.dtype | None = None, shape=None) -> _Quantized:
    """Returns the same bytes with another logical dtype or shape; `to(dtype)` would copy them."""
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
    """Returns the mode in which torch accepts a new tensor as a view of `tensor`."""
    return (
        torch.inference_mode(tensor.is_inference())
        if torch.is_inference_mode_enabled()
        else contextlib.nullcontext()
    )


def _written(schema, args, kwargs) -> Iterator:
    """Yields the arguments that an operator writes to."""
    for index, argument in enumerate(schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _check_copy(target: QuantizedTensor, source):
    """Raises NotImplementedError where `target.copy_(source)` cannot copy the bytes."""
    if (
        not isinstance(source, QuantizedTensor)
        or source._layout_cls != target._layout_cls
        or getattr(source._params, "format", None) is not getattr(target._params, "format", None)
        or source.shape != target.shape
    ):
        raise _refusal("copy_ from a tensor of another format or shape would write to", _TO_WRITE)
    if isinstance(target, PackedTensor) and not all(map(_is_writable, inner_tensors(target))):
        raise _refusal("copy_ would write to the file itself, not to", _TO_WRITE)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Returns whether torch allocated the memory. A write to the pages of a file is a crash."""
    return tensor.device.type != "cpu" or tensor.untyped_storage().resizable()


def _refusal(action: str, instead: str) -> NotImplementedError:
    """Returns the error for an action on a packed weight, such as "mul_ would write to"."""
    return NotImplementedError(
        f"A packed weight stays packed: {action} its dense values, which are not in memory."
        f" Instead, {instead}."
    )


def _write_error(func) -> NotImplementedError:
    """Returns the error for an operator that would write to a packed weight."""
    return _refusal(f"{func._schema.name.removeprefix('aten::')} would write to", _TO_WRITE)


def _refusing_method(name: str, action: str, instead: str) -> Callable:
    def method(self, *args, **kwargs):
        raise _refusal(f"{name} {action}", instead)

    method.__name__ = name
    return method


_IN_PLACE = {
    name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")
} - {"copy_", "detach_", "requires_grad_"}
for _name in _IN_PLACE:
    setattr(PackedTensor, _name, _refusing_method(_name, "would write to", _TO_WRITE))
PackedTensor.__setitem__ = _refusing_method("an assignment to a part of it", "would write to",
                                            _TO_WRITE)
for _name in ("data_ptr", "const_data_ptr", "storage", "_typed_storage", "__dlpack__",
              "share_memory_"):
    setattr(PackedTensor, _name, _refusing_method(_name, "asks for the memory of", _TO_SAVE))


class _NoMemory(torch.UntypedStorage):
    """The storage of a packed tensor: it has a size, which torch.compile reads, and no memory."""


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
        setattr(
            _NoMemory, _name,
            _refusing_method(f"{_name} of its storage", "asks for the memory of", _TO_SAVE))
