"""Finds what other nodes have set on a model that would go on using that model in a copy of it."""
import collections
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

MAX_DEPTH, MAX_OBJECTS = 6, 10_000  # that are looked through of one part
CONTAINERS = (list, tuple, set, frozenset, collections.deque)
# packages into whose objects nothing is looked
CLOSED = {"asyncio", "comfy", "logging", "numpy", "threading", "torch"}
LEAVES = (type(None), bool, int, float, str, bytes, torch.Tensor, type, types.ModuleType)


class SourceUse(NamedTuple):
    """The names of parts that other nodes have set on a model.

    Attributes:
        computing: those that are a block of the model, or call one.
        holding: those that only hold the model.
        unknown: those that hold too much to be looked through.
    """

    computing: list[str]
    holding: list[str]
    unknown: list[str]


def use_of_source(patcher: ModelPatcher) -> SourceUse:
    """Returns what would use a MODEL's own model in a copy of it, in which blocks have copies too:
    those in a function do not, since a copy has the same functions."""
    found, finder = SourceUse([], [], []), _Finder(patcher)
    for name, value, is_copied in _parts(patcher):
        kinds, names = finder.look_into(value, is_copied)
        if "block" in kinds or ("whole" in kinds and names & finder.computing):
            found.computing.append(name)
        elif "whole" in kinds:
            found.holding.append(name)
        elif "unknown" in kinds:
            found.unknown.append(name)
    return found


def _parts(patcher: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yields the name and value of each part, and whether a copy of the model has a copy of it."""
    own = set(map(id, patcher.model.modules()))
    for name, value in patcher.object_patches.items():
        is_bound = isinstance(value, types.MethodType) and id(value.__self__) in own
        yield name, value.__func__ if is_bound else value, False  # it is bound to the copy
    for name, module in patcher.model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                yield f"{name}.{attribute}", value, True
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
    """Looks for a model in objects. computing: names by which a function that has the whole model
    gets to its blocks."""

    def __init__(self, patcher: ModelPatcher):
        self._model: Any = patcher.model
        network = self._model.diffusion_model
        self._wholes = {id(self._model), id(network)}  # what has them may do so for a setting
        self._blocks = {id(module) for module in self._model.modules()
                        if next(module.parameters(), None) is not None} - self._wholes
        self._with_weights = self._blocks | self._wholes
        self._own = set(map(id, self._model.modules()))
        classes = type(network).__mro__[:type(network).__mro__.index(torch.nn.Module)]
        self.computing = {"apply_model", "forward", *(
            name for name, child in network.named_children() if id(child) in self._blocks), *(
            name for each in classes for name, value in vars(each).items()
            if isinstance(value, types.FunctionType) and not name.startswith("__"))}

    def look_into(self, value: Any, is_copied: bool) -> tuple[set[str], set[str]]:
        """Returns which of "block", "whole" and "unknown" are reached, and the names in the code of
        functions on the way."""
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
                return kinds | {"unknown"}, names
            if kind := self._kind(value):
                kinds |= {kind} - ({"block", "whole"} if is_copied else set())
            if kind and not isinstance(value, types.MethodType):
                continue
            is_atomic = isinstance(value, (types.FunctionType, weakref.ref))  # for copy.deepcopy
            names |= _names_in(value)
            waiting.extend((each, is_copied and not is_atomic, depth + 1)
                           for each in _inside(value, is_whole=not kind))
        return kinds, names

    def _kind(self, value: Any) -> str:
        if isinstance(value, types.MethodType) and id(value.__self__) in self._own:
            is_whole = value.__self__ is self._model and value.__name__ not in self.computing
            return "whole" if is_whole else "block"
        if isinstance(value, ModelPatcher):
            return "whole" if value.model is self._model else "other"
        if id(value) in self._own:
            return "whole" if id(value) in self._wholes else (
                "block" if id(value) in self._blocks else "other")
        is_wrapped = isinstance(value, torch.nn.Module) and any(
            id(module) in self._with_weights for module in value.modules())
        return "block" if is_wrapped else ""


def _inside(value: Any, is_whole: bool) -> list[Any]:
    """Returns what an object holds. is_whole: whether what a method is bound to counts."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, CONTAINERS):
        return list(value)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()
                 if cell != types.CellType()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(),
                *vars(value).values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, *([value.__self__] if is_whole else [])]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, torch.nn.Module):
        return [each for module in value.modules() for name, each in vars(module).items()
                if name not in ("_parameters", "_buffers", "_modules")]
    if type(value).__module__.partition(".")[0] in CLOSED:
        return []
    slots = [name for each in type(value).__mro__ for name, member in vars(each).items()
             if inspect.ismemberdescriptor(member)]
    return [*getattr(value, "__dict__", {}).values(),
            *(getattr(value, name, None) for name in slots)]


def _names_in(value: Any) -> set[str]:
    """Returns the names of attributes in the code of a function, or of an object's methods."""
    functions = [value] if isinstance(value, types.FunctionType) else [
        each for each in vars(type(value)).values() if isinstance(each, types.FunctionType)]
    codes = [function.__code__ for function in functions]
    for code in codes:
        codes.extend(each for each in code.co_consts if isinstance(each, types.CodeType))
    return {name for code in codes for name in code.co_names}
