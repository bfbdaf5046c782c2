"""What a loaded model holds, in a few words for its node."""
import collections
import os

import torch

from ..ops import kernels
from ..ops.packed_layout import is_packed
from .files.bitsandbytes import formats_in
from .files.container import WeightFile
from .files.safetensors import SafetensorsFile
from .sizes import size_text

PLAIN_NAMES = {dtype: name for name, dtype in SafetensorsFile.dtypes.items()}
# under which a patcher keeps what was done to its weights while they were read
PACK_STATS_KEY = "featherweight_packed"
SHOWN_FROM = 0.01  # of all bytes; biases and norms are less


def memory_summary(patcher) -> str:
    """The formats of a model's weights, those with the most bytes first, and all bytes: 'Q4_K +
    F32, 6.8 GB held'.

    Behind it stands what was done to them while they were read: 'packed from BF16 in 41 s'.

    patcher: the host's ModelPatcher of a model, text encoder or VAE.
    """
    sizes = collections.Counter()
    for tensor in patcher.model.parameters():
        sizes[format_name(tensor)] += tensor.nbytes
    names = [name for name, size in sizes.most_common() if size >= SHOWN_FROM * sizes.total()]
    done = patcher.get_attachment(PACK_STATS_KEY)
    # which a placement makes smaller
    size = patcher.full_size() if hasattr(patcher, "full_size") else patcher.model_size()
    return f"{' + '.join(names)}, {size_text(size)} held{f', {done}' if done else ''}"


def load_summary(file: WeightFile, patcher) -> str:
    """Return a line for the log: the formats in a file, its size, and the bytes held of it.

    Args:
        file: that the model was loaded of.
        patcher: the host's ModelPatcher of the model.
    """
    formats = collections.Counter(formats_in(file).values())
    counts = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    return (f"{os.path.basename(file.path)}: {formats.total()} tensors ({counts}),"
            f" {file.tensor_bytes} bytes on disk, {patcher.model_size()} bytes held")


def dequantize_backend_text(patcher) -> str | None:
    """What dequantises a model's weights on its device: "dequantised by triton"; None where none of
    them must be dequantised."""
    if any(
            is_packed(tensor) and tensor.layout_cls.format.plain_dtype is None
            for tensor in patcher.model.parameters()):
        return f"dequantised by {kernels.used(patcher.load_device)}"
    return None


def format_name(tensor: torch.Tensor) -> str:
    """What a tensor is held in: a key of `FORMATS`, the host's name of one of its own, or "F32",
    "BF16" ..."""
    if is_packed(tensor):
        return tensor.layout_cls.format.__name__
    layout = getattr(tensor, "_layout_cls", None)  # a tensor in a quantised format of the host
    if layout is not None:
        return layout.removeprefix("TensorCore").removesuffix("Layout")
    return PLAIN_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
