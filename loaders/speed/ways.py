"""The ways to compute a model: exactly, fast, and with dense weights.

A model whose layers are all this pack's changes its arithmetic in place. One whose layers ComfyUI
computes, or could compute, is loaded again from its file.
"""
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...ops.layers.kernel_requests import prepare_kernels
from ...ops.layers.kitchen_products import why_not_fast
from ...ops.layers.packed_layers import PackedLayer
from ...ops.layers.product import dequantize
from ...ops.pickle_names import short_error_name
from ...ops.tensor.packed_layout import QuantizedTensor, is_comfy_quantized, is_packed
from ..byte_sizes import size_text
from ..comfyui.foreign_weights import foreign_class
from ..comfyui.who_computes import host_multiplies
from ..devices import CPU, total_memory
from ..models.compute_choice import EXACTLY, FAST, MEANINGS
from ..quantizers.comfyui import row_type_of
from ..recipe import Recipe

copy_options: Any = comfy.utils.deepcopy_list_dict
DENSE = "dense"
WAYS = (EXACTLY, FAST, DENSE)
OTHER_LOADER = ("it was loaded by another loader: use Load Diffusion Model (GGUF, Featherweight)"
                " or Load Checkpoint (GGUF, Featherweight)")
SPARE_BYTES = 1 << 30  # of memory that is left for what a step needs


@short_error_name
class NotMeasured(Exception):
    """A way is not measured; the message says why."""


@contextlib.contextmanager
def computing(patcher: ModelPatcher, way: str) -> Iterator[ModelPatcher]:
    """Gives a patcher of the same weights and patches that computes in one way.

    Args:
        patcher: the host's, of a diffusion model; it is as before afterwards.
        way: one of `WAYS`.

    Raises:
        NotMeasured: The model cannot be computed so here.
    """
    if way == DENSE:
        yield _dense(patcher)
    elif _is_hosts(patcher, way):
        arithmetic, host_formats = MEANINGS[way]
        options = {"compute": arithmetic, "host_formats": host_formats}
        yield _loaded_again(patcher, options)
    else:
        with _computing_in_place(patcher, way):
            yield patcher


def without_loras(patcher: ModelPatcher) -> ModelPatcher:
    """Returns a clone without the patches of weights."""
    clone = patcher.clone()
    clone.patches, clone.patches_uuid = {}, uuid.uuid4()
    return clone


def has_fast_way(patcher: ModelPatcher) -> bool:
    """Returns whether "fast" is another arithmetic than "exact" for a model on its device."""
    device, layers = patcher.load_device, list(_quantized(patcher))
    has_integers = not why_not_fast(device, patcher.model.get_dtype_inference())
    return any(has_integers or host_multiplies(name, device) for name, _ in layers)


def _quantized(patcher: ModelPatcher) -> Iterator[tuple[str, bool]]:
    """Yields of each quantised layer its format, a name of ComfyUI's, and whether ComfyUI computes
    it."""
    for layer in patcher.model.diffusion_model.modules():
        weight = getattr(layer, "weight", None)
        if is_packed(weight):
            yield row_type_of(weight) or "", False
        elif is_comfy_quantized(weight):
            yield str(getattr(layer, "quant_format", "")), True


def _is_hosts(patcher: ModelPatcher, way: str) -> bool:
    """Returns whether layers change between this pack and ComfyUI for a way."""
    return any(by_comfyui != (way == FAST and host_multiplies(name, patcher.load_device))
               for name, by_comfyui in _quantized(patcher))


@contextlib.contextmanager
def _computing_in_place(patcher: ModelPatcher, way: str) -> Iterator[None]:
    """Changes the arithmetic of the packed layers while the block runs."""
    layers = [layer for layer in patcher.model.modules() if isinstance(layer, PackedLayer)]
    if not layers and way == FAST and not any(_quantized(patcher)):
        raise NotMeasured("its weights are not packed")
    before = [layer.__dict__.get("compute") for layer in layers]
    try:
        for layer in layers:
            layer.compute = MEANINGS[way].arithmetic
        prepare_kernels(patcher)
        yield
    finally:
        for layer, compute in zip(layers, before):
            if compute is None:
                del layer.compute
            else:
                layer.compute = compute


def _loaded_again(patcher: ModelPatcher, options: dict[str, Any]) -> ModelPatcher:
    """Returns the model, loaded again with other options, with the patches of the first one."""
    recipe = (getattr(patcher, "cached_patcher_init", None) or (None,))[0]
    if not isinstance(recipe, Recipe):
        raise NotMeasured(OTHER_LOADER)
    if recipe.options.get("pack_to"):
        raise NotMeasured("it was packed while loading: save it and load the saved file")
    again: Any = replace(recipe, options={**recipe.options, **options})()
    return patcher.clone(model_override=again.get_clone_model_override())


def _dense(patcher: ModelPatcher) -> ModelPatcher:
    """Returns the host's own model of the same values, in the dtype that the model computes in."""
    model: Any = patcher.model
    dtype = model.get_dtype_inference()
    if foreign_class(model):
        raise NotMeasured(OTHER_LOADER)
    weights = model.diffusion_model.state_dict(keep_vars=True)
    if not any(isinstance(tensor, QuantizedTensor) for tensor in weights.values()):
        raise NotMeasured("its weights are dense already")
    nbytes = sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize
    memory: dict[torch.device, Any] = {
        patcher.load_device: total_memory(patcher.load_device),
        CPU: comfy.model_management.get_free_memory(CPU)}
    for device, size in memory.items():
        if nbytes + SPARE_BYTES > size:
            raise NotMeasured(f"{size_text(nbytes)} of dense weights do not fit into the"
                              f" {size_text(size)} of {device.type.upper()} memory")
    values = {name: _dense_values(tensor, dtype).to(patcher.offload_device)
              for name, tensor in weights.items()}
    fresh = comfy.sd.load_diffusion_model_state_dict(
        values, model_options={"dtype": dtype, "load_device": patcher.load_device,
                               "offload_device": patcher.offload_device})
    if fresh is None:
        raise NotMeasured("ComfyUI does not know it from its dense weights")
    fresh.model.manual_cast_dtype = model.manual_cast_dtype
    fresh.patches = {name: list(patches) for name, patches in patcher.patches.items()}
    fresh.patches_uuid = patcher.patches_uuid
    fresh.object_patches = patcher.object_patches.copy()
    fresh.model_options = copy_options(patcher.model_options)
    return fresh


def _dense_values(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if is_packed(tensor):
        return dequantize(tensor, dtype)
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
