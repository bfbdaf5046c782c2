"""Describes in a few words, for a node or the log, what a loaded model holds."""
import collections
import logging
from collections.abc import Iterable

import torch

from ...ops import kernels
from ...ops.formats.base import FORMATS, Format
from ...ops.layers import kitchen_products
from ...ops.layers.packed_layers import PackedLinear
from ...ops.tensor.packed_layout import is_comfy_quantized, is_packed
from ..byte_sizes import size_text
from ..files.container import WeightFile
from ..files.safetensors import SafetensorsFile
from ..quantizers.bitsandbytes import formats_in
from ..quantizers.nunchaku import has_nunchaku_weights

log = logging.getLogger(__name__)

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


def load_summary(file: WeightFile, patcher) -> str:
    """Returns a line for the log: the formats in a file, its size, and the bytes held in memory.

    Args:
        file: the model's.
        patcher: the host's ModelPatcher of the model.
    """
    formats = collections.Counter(formats_in(file).values())
    if has_nunchaku_weights(file.entries):  # the types of its parts say little
        formats = collections.Counter(
            title_of(format_name(tensor)) for tensor in patcher.model.parameters())
    counts = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    return (f"{file.name}: {formats.total()} tensors ({counts}),"
            f" {file.tensor_bytes} bytes on disk, {patcher.model_size()} bytes in memory")


def dequantize_backend_text(patcher) -> str | None:
    """Returns which kernels dequantise a model: 'dequantized by CPU kernels'; None if none need to.

    The log says too what multiplies with inputs of few rows.

    Args:
        patcher: of the model.
    """
    formats = {within for tensor in patcher.model.parameters() if is_packed(tensor)
               for within in tensor.params.format.formats_within() if within.plain_dtype is None}
    if not formats:
        return None
    device = patcher.load_device
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    dtype_of_model = getattr(patcher.model, "get_dtype_inference", None)
    dtype = dtype if dtype_of_model is None else dtype_of_model()
    log.debug("[Featherweight] Inputs of few rows are multiplied by %s",
              kernels.used(device, formats, dtype, "linear"))
    return f"dequantized by {kernels.used(device, formats, dtype)}"


def host_product_text(patcher) -> str | None:
    """Returns which products of a model are ComfyUI's, or why it lacks some; None for neither.

    "multiplied by ComfyUI" for layers in its formats that it computes, and what `kitchen_text` says
    of others.
    """
    texts = []
    if any(map(is_comfy_quantized, patcher.model.parameters())):
        texts.append("multiplied by ComfyUI")
    dtype_of_model = getattr(patcher.model, "get_dtype_inference", lambda: torch.float16)
    layers = [module for module in patcher.model.modules() if isinstance(module, PackedLinear)]
    formats = {layer.weight.params.format for layer in layers if is_packed(layer.weight)}
    is_fast = any(layer.compute == "int8" for layer in layers)
    texts.append(kitchen_text(formats, patcher.load_device, dtype_of_model(), is_fast))
    return ", ".join(filter(None, texts)) or None


def kitchen_text(formats: Iterable[Format], device: torch.device, dtype: torch.dtype,
                 is_fast: bool = False) -> str:
    """Returns which formats comfy_kitchen's kernels multiply, or why they do not.

    Args:
        formats: of linear layers.
        device: where they run.
        dtype: of their inputs.
        is_fast: whether these layers use the kernels where there are some.

    Returns:
        "SVDQuant + AWQ multiplied by comfy_kitchen" or "exact, since comfy_kitchen's CUDA kernels
        are off: ..."; "" where there is nothing to say.
    """
    formats = list(formats)
    titles = sorted({kitchen_products.title_of(one) for one in formats
                     if is_fast and kitchen_products.runs(one, device, dtype)}, reverse=True)
    reasons = sorted({kitchen_products.why_off(one, device, dtype) for one in formats} - {""})
    texts = [f"{' + '.join(titles)} multiplied by comfy_kitchen"] if titles else []
    return "; ".join([*texts, *(f"exact, since {reason}" for reason in reasons)])


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
