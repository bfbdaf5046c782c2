"""The tensors of a file, a folder or a loaded model, under the names and in the shapes that the
host reads."""
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...ops.packed_layout import is_packed
from ..encoders import archs  # noqa: F401  registers the families
from ..encoders.arch import arch_of, strip_prefix
from ..files import open_weights
from ..files.container import WeightFile
from ..model_summary import format_name
from ..recipe import Recipe

# Folders of a package of diffusers that hold a model each.
PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


@dataclass
class Contents:
    """tensors: name -> tensor, packed or plain, not copied. formats: name -> how it is kept, a key
    of `FORMATS` or a dtype's name. metadata: of the file. declared_type: what the file says it is, "" where
    nothing. nbytes: on disk, 0 for a MODEL. memory_bytes: bytes that the tensors take in memory. file: that
    they were read of. patches: weights of a MODEL that LoRAs or merges change. config: the host's,
    of a MODEL.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    formats: dict[str, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    declared_type: str = ""
    nbytes: int = 0
    memory_bytes: int = 0
    patches: int = 0
    config: Any = None
    file: WeightFile | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def file_contents(path: str | os.PathLike) -> Contents:
    """What is in a file or folder that `open_weights` reads. Raises WeightFileError."""
    file = open_weights(path)
    tensors = file.state_dict()
    formats = {
        name: format_name(tensor) if is_packed(tensor) else
        file.entries[name].format if name in file.entries else format_name(tensor)
        for name, tensor in tensors.items()
    }
    return Contents(os.path.basename(os.path.normpath(path)), tensors, formats,
                    file.metadata, file.declared_type, file.tensor_bytes,
                    sum(tensor.nbytes for tensor in tensors.values()), file=file)


def model_contents(patcher) -> Contents:
    """What a loaded MODEL holds. patcher: the host's ModelPatcher of a diffusion model."""
    made_by = getattr(patcher, "cached_patcher_init", None)
    recipe = made_by[0] if made_by else None
    tensors = dict(patcher.model.diffusion_model.state_dict())
    name = (
        os.path.basename(recipe.paths[0])
        if isinstance(recipe, Recipe) and recipe.paths
        else "MODEL"
    )
    return Contents(name, tensors, {key: format_name(tensor) for key, tensor in tensors.items()},
                    memory_bytes=patcher.model_size(), patches=len(patcher.patches),
                    config=patcher.model.model_config)


def package_parts(path: str | os.PathLike) -> list[Path]:
    """The folders of a package that diffusers saved; none where `path` is no package."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return []
    return [folder / part for part in PARTS if (folder / part / "config.json").is_file()]


def shapes_only(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names, shapes and dtypes without values, for what looks at names and
    shapes.

    Vectors keep their values: the host's detection reads some.
    """
    return {
        name: tensor if tensor.ndim < 2 and not is_packed(tensor) else torch.empty(
            tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }


def encoder_comfy_keys(contents: Contents) -> tuple[dict[str, torch.Tensor], str]:
    """A text encoder's tensors without values under the host's names, and the family of its file's
    names, "" if the host's."""
    tensors = shapes_only(strip_prefix(dict(contents.tensors)))
    arch = arch_of(tensors)
    if arch is None:
        return tensors, ""
    try:
        return arch.convert(dict(tensors), contents.metadata), arch.__name__
    except (
        Exception
    ):  # a converter that needs values: there are none here, and the family says enough
        return tensors, arch.__name__
