"""Loads model patches (Z-Image Fun and Qwen-Image DiffSynth ControlNets, Uni3C, InfiniteTalk, USO,
SUPIR, LLLite); packed weights stay packed."""
from typing import Any

import comfy.model_patcher
import torch

from ...ops.tensor.row_slicing import dense
from ..comfyui.compute import AUTOMATIC, guided_dtypes
from ..comfyui.layer_classes import names_with_layers, rebind
from ..refusals.wrong_kind import MODEL_PATCH
from .pack_on_load import PackTo
from .side_models import Kind, LoadedFile, load_side_model


def load_model_patch(path: str, pack_to: PackTo | None = None,
                     compute: str = AUTOMATIC) -> comfy.model_patcher.ModelPatcher:
    """Loads a model patch and keeps its packed weights packed.

    The host's own node detects and builds it, so every model patch works that this ComfyUI knows.
    Arguments and errors are those of `load_side_model`.
    """
    return load_side_model(path, Kind(MODEL_PATCH, _build, _wrap), pack_to, compute)


def _wrap(patcher: comfy.model_patcher.ModelPatcher, packed_file: LoadedFile):
    packed_file.adopt(patcher, *guided_dtypes(patcher.load_device))


def _build(name: str, state_dict: dict[str, torch.Tensor], metadata: dict[str, str],
           operations: type | None) -> Any:
    """Builds the host's model patch from the weights of a file, see `Kind.build`."""
    from comfy_extras import nodes_model_patch  # here: the nodes of other models need none of it

    def read(path, *args, return_metadata=False, **kwargs):
        return (state_dict, metadata) if return_metadata else state_dict

    values = {
        "comfy.utils.load_torch_file": read,
        "folder_paths.get_full_path_or_raise": lambda folder, name: name,
    }
    if operations is not None:  # or it takes the dtype of codes where ComfyUI multiplies them
        values["comfy.utils.weight_dtype"] = lambda weights: torch.float32
    names = names_with_layers(nodes_model_patch, operations, values)
    load = rebind(nodes_model_patch.ModelPatchLoader.load_model_patch, names)
    patcher, = load(None, name)
    encoder = getattr(patcher.model, "denoise_encoder_sd", {})  # SUPIR's, patches for a VAE
    encoder.update({key: dense(tensor) for key, tensor in encoder.items()})
    return patcher
