"""The options that the loaders of models, checkpoints and text encoders share."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..comfyui.compute import AUTOMATIC, EXACT, computing
from ..recipe import Recipe
from .pack_on_load import PackTo


@dataclass(frozen=True)
class LoadOptions:
    """How a model, a checkpoint or a text encoder is to be loaded.

    Attributes:
        compute, host_formats: see `computing`, whose results they become.
        pack_to: what plain weights are packed to as they are read: see `PackTo`, or FIT. None: they
            stay as in the file.
        disable_dynamic: keep the model out of dynamic VRAM.
        model_options: the host's, such as `load_device`; `dtype` affects only files that go to the
            host's own loader.
    """

    compute: str = EXACT
    host_formats: str = AUTOMATIC
    pack_to: PackTo | None = None
    disable_dynamic: bool = False
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        compute, host_formats = computing(self.compute, self.host_formats)
        vars(self).update(compute=compute, host_formats=host_formats)

    @property
    def device(self) -> torch.device | None:
        """Where the model runs; None: the host's choice."""
        return self.model_options.get("load_device")

    def recipe(self, loader: str, *paths: str, **others: Any) -> Recipe:
        """Returns the recipe of a load; others: further arguments of the loader."""
        return Recipe(loader, tuple(map(str, paths)), vars(self) | others)
