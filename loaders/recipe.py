"""Records how a model was loaded, to load it again: on another device, outside dynamic VRAM, in
another process.

The host keeps a function and its arguments for that (`ModelPatcher.cached_patcher_init`); the
function is a `Recipe`.
"""
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The host names the modules of a node pack after the pack's folder, which differs between machines.
# So a recipe is pickled under this module name, which every process with this pack has.
PICKLED_IN = "_featherweight_recipe"

LOADERS: dict[str, Callable] = {}  # name -> function of paths and options that returns a patcher


def register_loader(name: str) -> Callable[[Callable], Callable]:
    """Registers a function for recipes: paths and options, with `disable_dynamic`, -> patcher."""
    def register(function: Callable) -> Callable:
        LOADERS[name] = function
        return function
    return register


@dataclass(frozen=True)
class Recipe:
    """A call that loads the same model again and returns its patcher.

    Attributes:
        loader: name of a function registered by `register_loader`.
        paths: of the files and folders.
        options: further arguments of the function, by name.
    """

    loader: str
    paths: tuple[str, ...]
    options: Mapping[str, Any]

    def __call__(self, disable_dynamic: bool = False):
        """Loads the model as before, or outside dynamic VRAM; the host passes `disable_dynamic`."""
        options = {**self.options, "disable_dynamic": True} if disable_dynamic else self.options
        return LOADERS[self.loader](*self.paths, **options)

    def attach(self, patcher):
        """Attaches the recipe to the host's ModelPatcher that it loads, and returns the patcher."""
        patcher.cached_patcher_init = (self, ())
        return patcher


def model_paths(patcher) -> list[str]:
    """Returns the paths that a diffusion model was loaded from: the model's, then its module's.

    They may be gone. Empty where neither the host nor a recipe has loaded the model.
    """
    load, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    if isinstance(load, Recipe):
        paths = [load.paths[0], load.options.get("extra")]
    else:
        paths = [next((value for value in arguments if isinstance(value, str)), None)]
    # other node packs give a name in place of a path
    return [path for path in paths if path and (os.path.isabs(path) or os.path.exists(path))]


def source_name(patcher) -> str:
    """Returns the name of the file that a model was loaded from, else of the model's class."""
    path = next(iter(model_paths(patcher)), "").rstrip("/\\")
    return os.path.splitext(os.path.basename(path))[0] or type(patcher.model).__name__


Recipe.__module__ = PICKLED_IN
sys.modules[PICKLED_IN] = sys.modules[__name__]
