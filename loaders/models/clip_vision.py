"""Loads CLIP vision models (CLIP, SigLIP, LLaVA's, DINO); packed weights stay packed."""
import re
from typing import Any

import comfy.clip_vision
import torch

from ...ops.tensor.row_slicing import dense, take_rows
from ..comfyui.compute import AUTOMATIC
from ..comfyui.keep_packed import keep_packed
from ..comfyui.layer_classes import names_with_layers, rebind
from ..refusals.wrong_kind import CLIP_VISION
from .pack_on_load import PackTo
from .side_models import Kind, LoadedFile, load_side_model

FUSED = re.compile(r"\.attn\.in_proj_weight$")  # query, key and value, in open_clip's names
WAN_WEIGHT = re.compile(r"^visual\.transformer\.\d")
# names in Wan-Video/Wan2.1, wan/modules/clip.py -> in open_clip
NAMES_OF_WAN = {
    "transformer.": "transformer.resblocks.", "cls_embedding": "class_embedding",
    "pos_embedding": "positional_embedding", "patch_embedding": "conv1", "pre_norm": "ln_pre",
    "post_norm": "ln_post", "head": "proj", "norm1": "ln_1", "norm2": "ln_2",
    "attn.to_qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}


def load_clip_vision(path: str, pack_to: PackTo | None = None,
                     compute: str = AUTOMATIC) -> comfy.clip_vision.ClipVisionModel:
    """Loads a CLIP vision model and keeps its packed weights packed.

    The host's own function detects and builds it, so every model works that this ComfyUI knows.
    Arguments and errors are those of `load_side_model`.
    """
    return load_side_model(path, Kind(CLIP_VISION, _build, _wrap), pack_to, compute)


def _wrap(clip_vision: Any, packed_file: LoadedFile):
    packed_file.adopt(clip_vision.patcher, torch.float32)  # pictures are float32
    if getattr(clip_vision, "naf", None) is not None:
        keep_packed(clip_vision.naf, torch.float32)


def _build(name: str, state_dict: dict[str, torch.Tensor], metadata: dict[str, str],
           operations: type | None) -> Any:
    """Builds the host's CLIP vision model from the weights of a file, see `Kind.build`."""
    if any(map(WAN_WEIGHT.match, state_dict)):
        state_dict = _in_names_of_open_clip(state_dict)
    weights: dict[str, Any] = {
        key: _Rows(tensor) if operations and FUSED.search(key) else tensor
        for key, tensor in state_dict.items()
    }
    names = names_with_layers(comfy.clip_vision, operations,
                              {"load_torch_file": lambda path: weights})
    model_class = comfy.clip_vision.ClipVisionModel
    names["ClipVisionModel"] = type(model_class.__name__, (model_class,), {
        "__init__": rebind(model_class.__init__, names)})
    return rebind(comfy.clip_vision.load, names)(name)


def _in_names_of_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the vision part of a CLIP under Wan's names with those and the shapes of open_clip's.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("visual."):
            for old, new in NAMES_OF_WAN.items():
                name = name.replace(old, new)
            renamed[name] = dense(tensor).squeeze() if name.endswith("_embedding") else tensor
    return renamed


class _Rows:
    """A weight of which the host takes slices of rows; they stay packed."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return take_rows(self.tensor, rows)
