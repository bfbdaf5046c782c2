"""Reads what a file, a folder or a loaded model holds, to say what it is and what fits a device."""
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE

from ...ops.formats.base import Format
from ...ops.layers.fast_by_kitchen import why_off
from ...ops.tensor.packed_layout import is_comfy_quantized, is_packed, safe_detach
from ..container.weight_file import WeightFile, WeightFileError
from ..encoders import archs  # noqa: F401  registers the families
from ..encoders.arch import arch_of, strip_prefix, unwrap_language_model
from ..files.diffusers_folder import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDER
from ..files.open_weights import open_weights
from ..quantizers.comfy_quant_formats import COMFYUI_FORMATS
from ..recipe import Recipe
from .comfy_quant_weights import as_tensors, with_marks
from .detection import try_detect
from .model_summary import arithmetic_text, dequantize_backend_text, format_name
from .weight_keys import model_prefix, to_comfy_keys


@dataclass
class Contents:
    """The tensors of one model and where they come from.

    Attributes:
        name: name of the file or folder.
        tensors: name -> tensor, packed or plain, not copied.
        formats: name -> how it is stored: a key of `FORMATS` or the name of a dtype.
        metadata: metadata of the file.
        declared_type: the type of model that the file declares, "" if none.
        nbytes: bytes on disk, 0 for a MODEL.
        memory_bytes: bytes of the tensors in memory.
        patches: number of weights of a MODEL that LoRAs or merges change.
        kernels: what dequantises and multiplies in a MODEL, or which kernels a file lacks here.
        config: the host's configuration of a MODEL.
        file: the file they were read from.
        problem: why a layer of the file cannot be loaded, "" if all can.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    formats: dict[str, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    declared_type: str = ""
    nbytes: int = 0
    memory_bytes: int = 0
    patches: int = 0
    kernels: str = ""
    config: BASE | None = None
    file: WeightFile | None = None
    problem: str = ""


def file_contents(path: str | os.PathLike) -> Contents:
    """Reads a file or folder that `open_weights` supports. Raises WeightFileError."""
    file = open_weights(path)
    tensors = file.state_dict()
    problem = ""
    try:
        tensors = with_marks(file, tensors)
        tensors = as_tensors(file, tensors, model_prefix(tensors), COMFYUI_FORMATS)
    except WeightFileError as error:
        problem = str(error)
    formats = {
        name: file.entries[name].format
        if name in file.entries and not is_packed(tensor)
        else format_name(tensor)
        for name, tensor in tensors.items()
    }
    return Contents(
        os.path.basename(os.path.normpath(path)), tensors, formats, file.metadata,
        file.declared_type, file.tensor_bytes,
        sum(tensor.nbytes for tensor in tensors.values()), file=file, problem=problem,
        kernels=why_exact({tensor.params.format for tensor in tensors.values()
                           if is_packed(tensor)}))


def model_contents(patcher: ModelPatcher) -> Contents:
    """Returns the contents of a loaded diffusion model."""
    cached_init = getattr(patcher, "cached_patcher_init", None)
    recipe = cached_init[0] if cached_init else None
    network = patcher.model.diffusion_model
    tensors = dict(network.state_dict())
    formats = {key: format_name(tensor) for key, tensor in tensors.items()}
    # The host's layers give the codes and scales of such weights as separate tensors.
    tensors |= {
        key: safe_detach(weight) for key, weight in network.named_parameters()
        if is_comfy_quantized(weight)
    }
    name = (
        os.path.basename(recipe.paths[0])
        if isinstance(recipe, Recipe) and recipe.paths
        else "MODEL"
    )
    return Contents(name, tensors, formats, memory_bytes=patcher.model_size(),
                    patches=len(patcher.patches), config=patcher.model.model_config,
                    kernels=", ".join(filter(None, (
                        dequantize_backend_text(patcher),
                        arithmetic_text(patcher)))))


def why_exact(formats: Iterable[Format]) -> str:
    """Returns why comfy_kitchen's kernels do not multiply weights of these formats on the device
    that models run on; "" where they do, or where there are none for them."""
    device: Any = comfy.model_management.get_torch_device()
    reasons = {why_off(one, device, torch.bfloat16) for one in formats} - {""}
    return "; ".join(f"exact, since {reason}" for reason in sorted(reasons))


def package_parts(path: str | os.PathLike) -> list[Path]:
    """Returns the model folders in a diffusers folder; an empty list if `path` is not one."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return []
    parts = (*MODEL_FOLDERS, *ENCODER_FOLDERS, VAE_FOLDER)
    return [folder / part for part in parts if (folder / part / "config.json").is_file()]


def shapes_only(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns meta tensors of the same names, shapes and dtypes.

    Plain vectors keep their values, since the host's detection reads some.
    """
    return {
        name: tensor
        if tensor.ndim < 2 and not is_packed(tensor)
        else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def diffusion_comfy_keys(contents: Contents) -> tuple[dict[str, torch.Tensor], str, Any]:
    """Returns tensors, as `shapes_only`, under ComfyUI's keys, and the diffusion model in them.

    Returns:
        Name -> tensor, the prefix of the model's names, and the host's configuration of the model,
        None if it detects none.
    """
    tensors = to_comfy_keys(shapes_only(contents.tensors))
    prefix = model_prefix(tensors)
    texts = {key: value for key, value in contents.metadata.items() if isinstance(value, str)}
    config = contents.config or try_detect(comfy.model_detection.model_config_from_unet, tensors,
                                           prefix, metadata=texts)
    return tensors, prefix, config


def unwrap_encoder(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns an encoder's weights without those of a model around it and without its prefix."""
    weights = strip_prefix(dict(weights))
    return unwrap_language_model(weights) if comfy.sd.detect_te_model(weights) is None else weights


def encoder_comfy_keys(contents: Contents) -> tuple[dict[str, torch.Tensor], str]:
    """Returns a text encoder's tensors, as `shapes_only`, under ComfyUI's keys, and its family.

    The family is "" if the file has ComfyUI's keys already.
    """
    tensors = unwrap_encoder(shapes_only(contents.tensors))
    arch = arch_of(tensors)
    if arch is None:
        return tensors, ""
    try:
        return arch.convert(dict(tensors), contents.metadata), arch.__name__
    except Exception:  # the conversion needs values, which are missing here
        return tensors, arch.__name__
