"""Packed weights, of random blocks or of given values, and the ratio of signal to noise that tells
how exact they are."""
import importlib.util
import math

import comfy.quant_ops  # noqa: F401  registers the layouts
import gguf
import numpy as np
import torch

from devtools.files.gguf_files import block_pool
from featherweight.ops.formats.base import FORMATS, Format
from featherweight.ops.formats.bnb_4bit import Codebook4Bit
from featherweight.ops.formats.row_layout import FAMILIES, RowFormat
from featherweight.ops.kernels.validation import random_tensors
from featherweight.ops.packing.pack_types import ROW_TYPES
from featherweight.ops.tensor.packed_layout import packed_tensor, with_low_rank
from featherweight.ops.tensor.packed_tensor import PackedTensor

# those of rows by the name of their family
FORMAT_NAMES = [
    *(name for name, packed_format in FORMATS.items()
      if packed_format.ggml_type is not None or isinstance(packed_format, Codebook4Bit)),
    *FAMILIES
]
# FORMAT_NAMES and these name what a weight may be packed in; so do ComfyUI's types (ROW_TYPES).
RANK = "+32"  # after the name of a family of rows: a low rank of 32 is part of the weight
# type -> the class of ComfyUI's own conversion, and how it is called
LAYOUTS = {
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}), "nvfp4": ("TensorCoreNVFP4Layout", {})}
RANKED_NAMES = [f"{name}{RANK}" for name in FAMILIES]


def format_for(name: str, columns: int) -> Format:
    """The format of a name in FORMAT_NAMES, for rows of so many values, without a low rank."""
    name = name.removesuffix(RANK)
    if name not in FAMILIES:
        return FORMATS[name]
    # SDNQ's files have scales of 128 columns for 4 bits with a low rank
    family = FAMILIES[name]
    sizes = (128,) if name.startswith("SDNQ") and family.example.codes.bits == 4 else ()
    return family.of_columns(columns, *sizes)


def takes_shape(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix of a shape can be packed: its rows are whole blocks, in groups whole
    groups."""
    if len(shape) != 2 or name in ROW_TYPES:
        return len(shape) == 2 and ROW_TYPES[name].takes(shape)
    columns = shape[1]
    packed_format = format_for(name, columns)
    if isinstance(packed_format, RowFormat):
        layout = packed_format.layout
        if not layout.groups:
            return False  # a row is shorter than a group
        return columns % layout.group == 0 and columns % (layout.rotation or 1) == 0
    return columns % packed_format.block_length == 0


def random_weight(format_name: str, shape: tuple[int, ...]) -> PackedTensor:
    """A packed weight of random valid blocks; in ComfyUI's types of random values."""
    if format_name in ROW_TYPES:
        values = torch.randn(shape) / shape[1] ** 0.5
        return ROW_TYPES[format_name].pack(values, is_plain=True)
    packed_format, scale = format_for(format_name, shape[1]), None
    generator, values = np.random.default_rng(0), math.prod(shape)
    if format_name in FAMILIES:
        return _random_rows(packed_format, shape)
    if format_name.endswith(RANK):
        weight = _random_rows(packed_format, shape)
        up, down = torch.randn(shape[0], 32) / 100, torch.randn(32, shape[1]) / 100
        return with_low_rank(weight, up.bfloat16(), down.bfloat16())
    if packed_format.ggml_type is None:
        data = torch.from_numpy(generator.integers(0, 256, values // 2, dtype=np.uint8))
        blocks = -(-values // packed_format.block_length)
        scale = torch.from_numpy(generator.uniform(0.01, 0.1, blocks).astype(np.float32))
    else:
        pool = block_pool(format_name)
        picks = generator.integers(0, len(pool), values // packed_format.block_length)
        data = torch.from_numpy(pool[picks]).view(packed_format.packed_shape(shape))
    return packed_tensor(packed_format, data, shape, scale=scale)


def _random_rows(packed_format: Format, shape: tuple[int, ...]) -> PackedTensor:
    """A packed weight of a format whose block is a row."""
    data, *qparams = random_tensors(packed_format, shape[0], torch.device("cpu"), bounded=True)
    for qparam in qparams:
        if qparam.is_floating_point():
            qparam /= 100
    return packed_tensor(packed_format, data, shape, torch.float32, *qparams)


def packed_weight(format_name: str, values: torch.Tensor) -> PackedTensor | None:
    """A weight of these values, float32 (N, K); None where neither the `gguf` package nor
    bitsandbytes packs it."""
    packed_format = FORMATS[format_name]
    if packed_format.ggml_type is not None:
        try:
            data = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[format_name])
        except NotImplementedError:
            return None
        return packed_tensor(packed_format, torch.from_numpy(data), values.shape)
    if not importlib.util.find_spec("bitsandbytes"):
        return None
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(values, blocksize=packed_format.block_length,
                                           quant_type=format_name.lower())
    return packed_tensor(packed_format, data.flatten(), values.shape, torch.float32, state.absmax)


def snr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to noise in dB; 20 dB are an error of a tenth."""
    exact = exact.double()
    return (20 * torch.log10(exact.norm() / (found.double() - exact).norm())).item()
