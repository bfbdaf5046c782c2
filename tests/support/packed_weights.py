"""Weights packed in 8 bits, convolutions too, and GGUF files of them."""
import torch
from pack_api import FORMATS, is_packed, pack_tensor

from featherweight.loaders.files.gguf_writer import gguf_writer
from featherweight.loaders.quantizers.integers import pack_rows
from featherweight.ops.tensor.packed_tensor import relabel


def pack_q8_0(matrix):
    return pack_tensor(matrix, FORMATS["Q8_0"])


def pack_int8(matrix):
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return pack_rows((matrix / scale).round().to(torch.int8), scale)


def packed_weights(weights, pack=pack_q8_0):
    """The same weights, all matrices and kernels packed whose rows take it."""
    return {
        name: relabel(pack(value.float().flatten(1)), shape=value.shape)
        if value.ndim > 1 and value[0].numel() % 32 == 0 else value
        for name, value in weights.items()
    }


def write_packed(path, tensors):
    """A GGUF file of packed and other tensors, as Save Packed Model writes it."""
    types = {name: (tuple(value.shape), "Q8_0" if is_packed(value) else "F32")
             for name, value in tensors.items()}
    with gguf_writer(path, types, {}, False) as writer:
        for name, value in tensors.items():
            writer.write(name, types[name][1], [value if is_packed(value) else value.float()])
