"""Values of ggml's formats by the gguf package, and by ggml's C where that has none."""
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType


def dequantize_q1_0(blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_q1_0` of ggml-quants.c, which gguf lacks."""
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = blocks[:, 2:, None] >> np.arange(8, dtype=np.uint8) & 1
    return np.where(bits.reshape(len(blocks), 128), d, -d)


def dequantize_q8_k(blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_q8_K` of ggml-quants.c, which gguf lacks."""
    d = blocks[:, :4].copy().view(np.float32)
    return d * blocks[:, 4:260].view(np.int8).astype(np.float32)


WITHOUT_REFERENCE = {"Q1_0": dequantize_q1_0, "Q8_K": dequantize_q8_k}


def reference(fmt, blocks: np.ndarray) -> torch.Tensor:
    """Returns float32 (n, block_length). blocks: uint8 (n, block_bytes)."""
    with np.errstate(all="ignore"):
        if fmt.name in WITHOUT_REFERENCE:
            return torch.from_numpy(WITHOUT_REFERENCE[fmt.name](blocks))
        return torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType(fmt.ggml_type)))
