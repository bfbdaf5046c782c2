"""Describes in a few words, for a node or the log, what a loaded model holds."""
import collections
import os

import torch

from ...ops import kernels
from ...ops.formats.base import FORMATS
from ...ops.tensor.packed_layout import QuantizedTensor, is_packed
from ..byte_sizes import size_text
from ..files.container import WeightFile
from ..files.safetensors import SafetensorsFile
from ..quantizers.bitsandbytes import formats_in
from ..quantizers.nunchaku import has_nunchaku_weights

PLAIN_NAMES = {dtype: name for name, dtype in SafetensorsFile.dtypes.items()}
PACK_STATS_KEY = "featherweight_packed"  # attachment of a patcher: its `pack_on_load.PackStats`
MIN_SHOWN_SHARE = 0.01  # of all bytes; biases and norms have less


def memory_summary(patcher) -> str:
    """Returns a model's formats, by bytes, and its size: 'Q4_K + F32, 6.8 GB held'.

    If they were packed while they were read, that follows: ', packed from BF16 in 41 s'.

    Args:
        patcher: the host's ModelPatcher of a model, text encoder or VAE.
    """
    sizes = collections.Counter()
    for tensor in patcher.model.parameters():
        sizes[title_of(format_name(tensor))] += tensor.nbytes
    smallest = MIN_SHOWN_SHARE * sizes.total()
    names = [name for name, size in sizes.most_common() if size >= smallest]
    pack_stats = patcher.get_attachment(PACK_STATS_KEY)
    # A placement makes `model_size` smaller.
    size = patcher.full_size() if hasattr(patcher, "full_size") else patcher.model_size()
    return f"{' + '.join(names)}, {size_text(size)} held{f', {pack_stats}' if pack_stats else ''}"


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
    return (f"{os.path.basename(file.path)}: {formats.total()} tensors ({counts}),"
            f" {file.tensor_bytes} bytes on disk, {patcher.model_size()} bytes held")


def dequantize_backend_text(patcher, with_products: bool = False) -> str | None:
    """Returns which kernels dequantise a model: 'dequantised by nvrtc'; None if none need to.

    Args:
        patcher: of the model.
        with_products: whether to say too what multiplies with inputs of few rows.
    """
    formats = {within for tensor in patcher.model.parameters() if is_packed(tensor)
               for within in tensor.params.format.formats_within() if within.plain_dtype is None}
    if not formats:
        return None
    device = patcher.load_device
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    dtype_of_model = getattr(patcher.model, "get_dtype_inference", None)
    dtype = dtype if dtype_of_model is None else dtype_of_model()
    texts = [f"dequantised by {kernels.used(device, formats, dtype)}"]
    if with_products:
        texts.append(f"few rows multiplied by {kernels.used(device, formats, dtype, 'linear')}")
    return ", ".join(texts)


def host_product_text(patcher) -> str | None:
    """Returns "multiplied by ComfyUI" for a model with layers in its formats that it computes."""
    if any(isinstance(tensor, QuantizedTensor) and not is_packed(tensor)
           for tensor in patcher.model.parameters()):
        return "multiplied by ComfyUI"
    return None


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
