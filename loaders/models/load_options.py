"""The options that the loaders of models, checkpoints and text encoders share."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..comfyui.who_computes import AUTOMATIC
from ..recipe import Recipe
from .pack_on_load import PackTo


@dataclass(frozen=True)
class LoadOptions:
    """How a model, a checkpoint or a text encoder is to be loaded.

    Attributes:
        compute: one of `compute_dtype.COMPUTE`.
        host_formats: one of `who_computes.HOST_FORMATS`.
        pack_to: what plain weights are packed to as they are read: see `PackTo`, or FIT. None: they
            stay as in the file.
        disable_dynamic: keep the model out of dynamic VRAM.
        model_options: the host's, such as `load_device`; `dtype` affects only files that go to the
            host's own loader.
    """

    compute: str = "exact"
    host_formats: str = AUTOMATIC
    pack_to: PackTo | None = None
    disable_dynamic: bool = False
    model_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device | None:
        """Where the model runs; None: the host's choice."""
        return self.model_options.get("load_device")

    def recipe(self, loader: str, *paths: str, **others: Any) -> Recipe:
        """Returns the recipe of a load; others: further arguments of the loader."""
        return Recipe(loader, tuple(map(str, paths)), vars(self) | others)
