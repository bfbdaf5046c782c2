"""Between a weight file and the host: which files are read here, what goes with the weights, and the model taken back.

Every loader of this folder comes by here.
"""
import collections
import itertools
import logging
import os

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_detection import unet_prefix_from_state_dict
from safetensors import SafetensorError, safe_open

from ..ops.int8 import multiplies_integers
from ..ops.needs import prepare_kernels
from ..ops.operations import packed_operations
from ..ops.patcher import adopt
from ..ops.tensor import is_packed
from .files.bitsandbytes import formats_in, has_packed_weights
from .files.container import FileChangeGuard, WeightFile
from .files.safetensors import is_shard
from .packing.host_formats import find_unread_layer

log = logging.getLogger(__name__)


def is_ours(path: str, pack_to: str | None = None) -> bool:
    """Whether a file is for our reader: GGUF, a folder, or safetensors in several files or with weights bitsandbytes packed.

    Everything else is for the host's own loaders, which take one file for a whole model, unless it is to be packed. A damaged
    safetensors file and one in a quantised format that the host does not read are ours, because our reader says what is wrong.
    """
    name = str(path).lower()
    if pack_to or name.endswith(".gguf") or os.path.isdir(path):
        return True
    if not name.endswith((".safetensors", ".sft")):
        return False
    if is_shard(path):
        return True
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return has_packed_weights(names) or find_unread_layer(names, file.get_tensor, file.metadata() or {}) is not None
    except (SafetensorError, OSError, RuntimeError):  # the last from torch, which maps the file
        return True


def model_prefix(state_dict: dict[str, torch.Tensor]) -> str:
    """What the names of a checkpoint's model begin with; "" in a file of a model alone, for which the host drops operations."""
    prefix = unet_prefix_from_state_dict(state_dict)
    return prefix if sum(name.startswith(prefix) for name in state_dict) > 5 else ""


def operations_for(state_dict: dict[str, torch.Tensor], value_dtype: torch.dtype | None = None,
                   patch_dtype: torch.dtype | None = None, full_precision: bool = False, compute: str = "exact") -> type:
    """The host's `custom_operations` for these weights. full_precision: of layers in the host's own quantised formats."""
    mixed = any(name.endswith(".comfy_quant") for name in state_dict)
    return packed_operations(value_dtype, patch_dtype, mixed, full_precision, compute)


def text_metadata(file: WeightFile) -> dict[str, str]:
    """What the host takes as a file's metadata."""
    return {key: value for key, value in file.metadata.items() if isinstance(value, str)}


def in_the_hosts_formats(file: WeightFile, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a file without packed ones as the host takes them; files that it reads itself it changes in the same way.

    Layers in its own quantised formats have a `comfy_quant` then, whether the file has that, a `scaled_fp8`, or metadata.
    """
    if any(map(is_packed, state_dict.values())):
        return state_dict
    prefix, metadata = model_prefix(state_dict), text_metadata(file)
    return comfy.utils.convert_old_quants(state_dict, model_prefix=prefix, metadata=metadata)[0]


def take_back(patcher: comfy.model_patcher.ModelPatcher, file: WeightFile, compute: str):
    """A diffusion model that the host has built of a file's weights: packed ones stay packed from here on.

    The log says what the model holds, and where its device has no units for the int8 products that `compute` asks for.
    """
    log.info("[Featherweight] %s", report(file, adopt(patcher)))
    patcher.model.packed_patches.watch = guard_of(patcher.model)
    prepare_kernels(patcher.model, patcher.load_device, patcher.model.get_dtype_inference())
    if compute == "int8" and not multiplies_integers(patcher.load_device):
        log.warning("[Featherweight] compute is int8, for which %s has no units that this pack uses (NVIDIA from Turing on, and"
                    " CPUs with VNNI or AMX, have them). The model computes as with exact.", patcher.load_device)


class PackedCLIP(comfy.sd.CLIP):
    """The host's CLIP, which computes with the model of its patcher.

    The host's node that chooses a device gives it another patcher with a model of its own, loads that one, and would compute
    with the one before, from which it has taken the LoRAs.
    """

    @property
    def cond_stage_model(self):
        return self.patcher.model

    @cond_stage_model.setter
    def cond_stage_model(self, model):
        """The host sets here the model of the patcher that it sets too."""

    def load_model(self, *args, **kwargs):
        self.patcher.model.packed_patches.watch()  # the host calls this before it encodes
        return super().load_model(*args, **kwargs)

    def clone(self, *args, **kwargs):
        return _computing_with_its_patcher(super().clone(*args, **kwargs))


def _computing_with_its_patcher(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    clip.__dict__.pop("cond_stage_model", None)
    clip.__class__ = PackedCLIP
    return clip


def take_back_encoder(clip: comfy.sd.CLIP):
    """A text encoder that the host has built of files' weights: packed ones stay packed from here on, on every device."""
    adopt(clip.patcher).model.packed_patches.watch = guard_of(clip.patcher.model)
    prepare_kernels(clip.patcher.model, clip.patcher.load_device, None)
    _computing_with_its_patcher(clip)


def guard_of(model: torch.nn.Module) -> FileChangeGuard:
    """Return what raises where one of the files is written to that the weights of a model lie in."""
    return FileChangeGuard.of(itertools.chain(model.parameters(), model.buffers()))


def report(file: WeightFile, patcher: comfy.model_patcher.ModelPatcher) -> str:
    """One line for the log: what the file holds, its size, and the bytes its weights take in memory."""
    formats = collections.Counter(formats_in(file).values())
    counts = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    return (f"{os.path.basename(file.path)}: {formats.total()} tensors ({counts}), {file.tensor_bytes} bytes on disk,"
            f" {patcher.model_size()} bytes held")
