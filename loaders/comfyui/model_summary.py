"""Describes in a few words, for a node or the log, what a loaded model holds."""
import collections
from collections.abc import Iterable
from typing import Any

import torch

from ...ops import kernels
from ...ops.formats.base import FORMATS, Format
from ...ops.kernels.kernel import dtype_name
from ...ops.layers import fast_by_kitchen
from ...ops.layers.packed_layers import PackedLinear
from ...ops.log import log
from ...ops.tensor.packed_layout import is_comfy_quantized, is_packed
from ..byte_sizes import size_text
from ..container.weight_file import WeightFile
from ..files.safetensors import SafetensorsFile
from ..quantizers.bitsandbytes import formats_in
from ..quantizers.nunchaku import has_nunchaku_weights
from .compute import host_multiplies

PLAIN_NAMES = {dtype: name for name, dtype in SafetensorsFile.dtypes.items()}
PACK_STATS_KEY = "featherweight_packed"  # attachment of a patcher: its `pack_on_load.PackStats`
MIN_SHOWN_SHARE = 0.01  # of all bytes; biases and norms have less


def memory_summary(patcher) -> str:
    """Returns a model's formats, by bytes, and its size: 'Q4_K + F32, 6.8 GB in memory'.

    If they were packed while they were read, that follows: ', packed from BF16 in 41 s'.

    Args:
        patcher: the host's ModelPatcher of a model, text encoder or VAE.
    """
    sizes = format_sizes(patcher.model.parameters())
    smallest = MIN_SHOWN_SHARE * sizes.total()
    names = [name for name, size in sizes.most_common() if size >= smallest]
    pack_stats = patcher.get_attachment(PACK_STATS_KEY)
    # A placement makes `model_size` smaller.
    size = patcher.full_size() if hasattr(patcher, "full_size") else patcher.model_size()
    stats = f", {pack_stats}" if pack_stats else ""
    return f"{' + '.join(names)}, {size_text(size)} in memory{stats}"


def format_sizes(tensors: Iterable[torch.Tensor]) -> collections.Counter[str]:
    """Returns the bytes of tensors by their formats' names for people."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        sizes[title_of(format_name(tensor))] += tensor.nbytes
    return sizes


def log_load_summary(file: WeightFile, patcher):
    """Logs the formats in a file, its size, and the bytes that its model holds in memory."""
    formats = collections.Counter(formats_in(file).values())
    if has_nunchaku_weights(file.entries):  # the types of its parts say little
        formats = collections.Counter(
            title_of(format_name(tensor)) for tensor in patcher.model.parameters())
    counts = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    log.info("%s: %d tensors (%s), %d bytes on disk, %d bytes in memory", file.name,
             formats.total(), counts, file.tensor_bytes, patcher.model_size())


def dequantize_backend_text(patcher) -> str | None:
    """Returns which kernels dequantise a model: 'dequantized by CPU kernels'; None if none need to.

    The log says too what multiplies with inputs of few rows.
    """
    formats, device, dtype = _dequantizing(patcher)
    if not formats:
        return None
    log.debug("Inputs of few rows are multiplied by %s",
              kernels.used(device, formats, dtype, "linear"))
    return f"dequantized by {kernels.used(device, formats, dtype)}"


def _dequantizing(patcher) -> tuple[set[Format], torch.device, torch.dtype]:
    """Returns the formats that are dequantised in a model, where, and to what."""
    formats = {within for tensor in patcher.model.parameters() if is_packed(tensor)
               for within in tensor.params.format.formats_within() if within.plain_dtype is None}
    device = patcher.load_device
    usual = torch.float32 if device.type == "cpu" else torch.float16
    return formats, device, _compute_dtype(patcher) or usual


def _compute_dtype(patcher) -> torch.dtype | None:
    """Returns what a diffusion model computes in; None for another model."""
    get_dtype = getattr(patcher.model, "get_dtype_inference", None)
    return None if get_dtype is None else get_dtype()


def arithmetic_text(patcher) -> str | None:
    """Returns which arithmetic the layers of a model were given; None where nothing is known of it.

    Such as "computes exactly in bfloat16", "int8 by ComfyUI's kernels (fast), the rest exactly in
    bfloat16", or "computes exactly in float16, since ..." where faster kernels were asked for.

    Args:
        patcher: the host's ModelPatcher of a model, text encoder or VAE.
    """
    dtype = _compute_dtype(patcher)
    within = f" in {dtype_name(dtype)}" if dtype else ""
    if getattr(patcher.model, "rounds_f16", False):  # of `choose_compute`
        within += ", to which F16 weights are rounded"
    device, usual = patcher.load_device, dtype or torch.float16
    found = (_product_of(layer, device, usual) for layer in patcher.model.modules())
    products = {product for product in found if product is not None}
    titles = collections.defaultdict(list)
    for product in sorted({product for product in products if product.title}, reverse=True):
        titles[product.owner].append(product.title)
    fast = ", ".join(f"{' + '.join(names)} by {owner} (fast)" for owner, names in titles.items())
    is_exact = any(not product.title for product in products)
    if fast:
        text = f"{fast}, the rest exactly{within}" if is_exact else fast
    elif products or within:
        text = f"computes{' exactly' if is_exact else ''}{within}"
    else:
        return None
    reasons = sorted({product.why_exact for product in products} - {""})
    return f"{text}, since {'; '.join(reasons)}" if reasons else text


def _product_of(layer: Any, device: torch.device,
                dtype: torch.dtype) -> fast_by_kitchen.Used | None:
    """Returns what multiplies with the quantized weight of a linear layer; None for others."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, PackedLinear) and is_packed(weight):
        return fast_by_kitchen.used(weight.params.format, device, dtype, layer.compute)
    if not is_comfy_quantized(weight) or not hasattr(layer, "_full_precision_mm"):
        return None
    name = str(layer.quant_format)
    is_fast = host_multiplies(name, device) and not layer._full_precision_mm
    return fast_by_kitchen.Used(name if is_fast else "", fast_by_kitchen.COMFYUI_KERNELS)


def title_of(name: str) -> str:
    """Returns a format's name for people, the same for rows of all lengths."""
    return FORMATS[name].title() if name in FORMATS else name


def format_name(tensor: torch.Tensor) -> str:
    """Returns a tensor's format: a key of `FORMATS`, a name of the host's, or "F32", "BF16" ..."""
    if is_packed(tensor):
        return tensor.params.format.name
    layout = getattr(tensor, "_layout_cls", None)  # a tensor in a quantised format of the host
    if layout is not None:
        return layout.removeprefix("TensorCore").removesuffix("Layout")
    return PLAIN_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
