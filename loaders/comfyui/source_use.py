"""Finds what other nodes have set on a model that would go on using that model in a copy of it."""
import collections
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

MAX_DEPTH, MAX_OBJECTS = 6, 10_000  # that are looked through of one part
CLOSED = {"asyncio", "comfy", "logging", "numpy", "threading", "torch"}  # packages: not objects of
LEAVES = (type(None), bool, int, float, str, bytes, torch.Tensor, type, types.ModuleType)
TREE = ("_parameters", "_buffers", "_modules")  # of a module


def use_of_source(patcher: ModelPatcher) -> dict[str, list[str]]:
    """Returns the names of the parts that a copy of a MODEL's model would share with it.

    Returns:
        By kind. "block": they are a block of the model, or call one. "whole": they hold the model.
        "unknown": they hold too much to be looked through.
    """
    found: dict[str, list[str]] = {"block": [], "whole": [], "unknown": []}
    finder = _Finder(patcher.model)
    for name, value, is_copied in _parts(patcher, finder.own):
        kinds = finder.kinds_in(value, is_copied)
        if kind := next((kind for kind in found if kind in kinds), None):
            found[kind].append(name)
    return found


def _parts(patcher: Any, own: set[int]) -> Iterator[tuple[str, Any, bool]]:
    """Yields the name and value of each part, and whether a copy of the model has a copy of it."""
    for name, value in patcher.object_patches.items():
        is_bound = isinstance(value, types.MethodType) and id(value.__self__) in own
        yield name, value.__func__ if is_bound else value, False  # it is bound to the copy
    for name, module in patcher.model.named_modules():
        yield from ((f"{name}.{attribute}", value, True)
                    for attribute, value in vars(module).items() if attribute not in TREE)
    options = dict(patcher.model_options)
    inner = options.pop("transformer_options", {})
    for group in (options, inner, {"wrappers": patcher.wrappers, "callbacks": patcher.callbacks}):
        yield from ((name, value, False) for name, value in _flat("", group))


def _flat(name: str, value: Any, levels: int = 3) -> Iterator[tuple[str, Any]]:
    """Yields the names and values in options, as "patches_replace dit ('double_block', 0)"."""
    if not isinstance(value, dict) or levels < 0:
        yield name, value
        return
    for key, each in value.items():
        yield from _flat(f"{name} {key}".strip(), each, levels - 1)


class _Finder:
    """Looks for a model, and for its modules, in objects."""

    def __init__(self, model: Any):
        self._model, network = model, model.diffusion_model
        self.own = set(map(id, model.modules()))
        self._blocks = {id(module) for module in model.modules()
                        if next(module.parameters(), None) is not None}
        self._wholes = {id(model), id(network)}
        classes = type(network).__mro__[:type(network).__mro__.index(torch.nn.Module)]
        # by which a function that has the whole model gets to its blocks
        self._names = {"apply_model", "forward", *(
            name for name, child in network.named_children() if id(child) in self._blocks), *(
            name for each in classes for name, value in vars(each).items()
            if isinstance(value, types.FunctionType) and not name.startswith("__"))}

    def kinds_in(self, value: Any, is_copied: bool) -> set[str]:
        """Returns the kinds, see `use_of_source`, of what is reached from an object."""
        kinds: set[str] = set()
        names: set[str] = set()
        seen: dict[tuple[int, bool], Any] = {}
        waiting = collections.deque([(value, is_copied, 0)])
        while waiting:
            value, is_copied, depth = waiting.popleft()
            if isinstance(value, LEAVES) or (id(value), is_copied) in seen:
                continue
            seen[id(value), is_copied] = value
            if depth > MAX_DEPTH or len(seen) > MAX_OBJECTS:
                kinds.add("unknown")
                break
            kind = self._kind(value)
            if kind and not is_copied:
                kinds.add(kind)
            if kind and not isinstance(value, types.MethodType):
                continue
            names |= _names_in(value)
            # copy.deepcopy copies neither functions nor weak references
            is_copied = is_copied and not isinstance(value, (types.FunctionType, weakref.ref))
            waiting.extend((each, is_copied, depth + 1) for each in _inside(value)
                           if not kind or each is not getattr(value, "__self__", None))
        return kinds | {"block"} if "whole" in kinds and names & self._names else kinds

    def _kind(self, value: Any) -> str:
        """Returns "block", "whole", "other" for what is nothing of both but the host's, or ""."""
        if isinstance(value, types.MethodType) and id(value.__self__) in self.own:
            is_setting = value.__self__ is self._model and value.__name__ not in self._names
            return "whole" if is_setting else "block"
        if isinstance(value, ModelPatcher) or id(value) in self.own:
            value = value.model if isinstance(value, ModelPatcher) else value
            return "whole" if id(value) in self._wholes else (
                "block" if id(value) in self._blocks else "other")
        is_around = isinstance(value, torch.nn.Module) and any(
            id(module) in self._blocks for module in value.modules())
        return "block" if is_around else ""


def _inside(value: Any) -> list[Any]:
    """Returns what an object holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return list(value)
    if isinstance(value, types.FunctionType):
        cells = (cell for cell in value.__closure__ or () if cell != types.CellType())
        return [*(cell.cell_contents for cell in cells), *(value.__defaults__ or ()),
                *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, torch.nn.Module):
        return [each for module in value.modules() for name, each in vars(module).items()
                if name not in TREE]
    if type(value).__module__.partition(".")[0] in CLOSED:
        return []
    slots = (name for each in type(value).__mro__ for name, member in vars(each).items()
             if inspect.ismemberdescriptor(member))
    return [*getattr(value, "__dict__", {}).values(),
            *(getattr(value, name, None) for name in slots)]


def _names_in(value: Any) -> set[str]:
    """Returns the names of attributes in the code of a function, or of an object's methods."""
    held = [value] if isinstance(value, types.FunctionType) else vars(type(value)).values()
    codes = [each.__code__ for each in held if isinstance(each, types.FunctionType)]
    for code in codes:
        codes.extend(each for each in code.co_consts if hasattr(each, "co_names"))
    return {name for code in codes for name in code.co_names}
