"""Calls functions of the host that take no layer classes from their caller with those of this pack.

The host's loaders of model patches and CLIP vision models name `comfy.ops.manual_cast` themselves.
A copy of such a function looks up its global names in a copy of its module's names, some of which
have another value. The module itself stays as it is, for other nodes and threads.
"""
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class _View:
    """An object of which some attributes have another value."""

    def __init__(self, target: Any, values: Mapping[str, Any]):
        vars(self).update(values)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def names_with_layers(module: types.ModuleType, operations: type | None,
                      values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names of a module of the host for functions that build layers and read a file.

    The functions of the module see them too when they call each other.

    Args:
        module: of the host.
        operations: classes of the layers; None for the host's.
        values: dotted name, as the module's functions write it -> another value.
    """
    if operations is not None:
        # newer ones choose their layer classes
        choices = dict.fromkeys(("comfy.ops.pick_operations", "comfy.ops.mixed_precision_ops"),
                                lambda *args, **kwargs: operations)
        values = {"comfy.ops.manual_cast": operations, **choices, **values}
    names = dict(vars(module))
    for dotted, value in values.items():
        first, *path = dotted.split(".")
        names[first] = _replace(names.get(first), path, value)
    for name, value in vars(module).items():
        is_own = isinstance(value, types.FunctionType) and value.__globals__ is vars(module)
        if is_own and names[name] is value:
            names[name] = rebind(value, names)
    return names


def rebind(function: Callable, names: dict[str, Any]) -> Callable:
    """Returns a copy of a function that looks up its global names in `names`."""
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__,
                              function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _replace(target: Any, path: Sequence[str], value: Any) -> Any:
    """Returns a view of `target` in which the attribute at `path` is `value`."""
    if not path:
        return value
    return _View(target, {path[0]: _replace(getattr(target, path[0], None), path[1:], value)})
