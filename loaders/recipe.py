"""How a model was loaded, so that it can be loaded once more: for another device, outside of
dynamic VRAM, in another process.

The host keeps a function with its arguments beside each model (`ModelPatcher.cached_patcher_init`).
Ours is a `Recipe`.
"""
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .files.container import safe_repr

# The host names the modules of a node pack by the pack's folder, which lies elsewhere on another
# machine. A recipe is pickled under this name, by which every process with this pack finds this
# module.
PICKLED_IN = "_featherweight_recipe"

LOADERS: dict[str, Callable] = {}


def register_loader(kind: str) -> Callable[[Callable], Callable]:
    """Registers the function, of paths and options (`disable_dynamic` among them) -> patcher, that
    recipes of a kind call."""
    def register(function: Callable) -> Callable:
        LOADERS[kind] = function
        return function
    return register


@dataclass(frozen=True)
class Recipe:
    """A call that loads the same model again and returns its patcher.

    loader: the kind of model that a function was registered for by `register_loader`. paths: of the
    files and folders. options: what else that function takes, by name.
    """

    loader: str
    paths: tuple[str, ...]
    options: Mapping[str, Any]

    def __call__(self, disable_dynamic: bool = False):
        """disable_dynamic: load out of dynamic VRAM, for which the host asks by this name; else as
        the first time."""
        options = {**self.options, "disable_dynamic": True} if disable_dynamic else self.options
        return LOADERS[self.loader](*self.paths, **options)

    def __str__(self) -> str:
        options = "".join(f", {name} {safe_repr(value)}" for name, value in self.options.items()
                          if value)
        return f"{self.loader} from {' and '.join(map(safe_repr, self.paths))}{options}"

    def attach(self, patcher):
        """Leave the recipe with the host's ModelPatcher of the model it was loaded by. Returns
        it."""
        patcher.cached_patcher_init = (self, ())
        return patcher


Recipe.__module__ = PICKLED_IN
sys.modules[PICKLED_IN] = sys.modules[__name__]
