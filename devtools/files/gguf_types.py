"""The packed types of llama.cpp that the newest `gguf` package does not know yet, added to its
tables.

Importing this module adds them, so that gguf's own writer and reader take them. A newer `gguf` that
knows one is left alone.
"""
import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES


def _dequantize_q2_0(blocks: np.ndarray) -> np.ndarray:
    """`dequantize_row_q2_0` of ggml-quants.c for blocks of any length."""
    scales = blocks[:, :2].view(np.float16).astype(np.float32)
    codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return scales * (codes.reshape(len(blocks), -1).astype(np.float32) - 1)


# Name -> number, values in a block, bytes of a block, and what dequantizes blocks, uint8
# (n, bytes), to float32. Q2_0: ggml.h and ggml-common.h of llama.cpp b11192. PQ2_0: PrismML's.
NEWER_TYPES = {"Q2_0": (42, 64, 18, _dequantize_q2_0), "PQ2_0": (142, 128, 34, _dequantize_q2_0)}
FORK_TYPES = {"PQ2_0", "PTQ1_0"}  # which llama.cpp itself does not have


def _add_type(name: str, number: int, block_length: int, block_bytes: int):
    """Make a member of gguf's enumeration of types, which `enum` itself has no way to extend."""
    member = int.__new__(GGMLQuantizationType, number)
    member._name_, member._value_ = name, number
    type.__setattr__(GGMLQuantizationType, name, member)
    GGMLQuantizationType._member_names_.append(name)
    GGMLQuantizationType._member_map_[name] = GGMLQuantizationType._value2member_map_[
        number] = member
    GGML_QUANT_SIZES[member] = block_length, block_bytes


for _name, (*_sizes, _dequantize) in NEWER_TYPES.items():
    if _name not in GGMLQuantizationType.__members__:
        _add_type(_name, *_sizes)
    if GGMLQuantizationType[_name] not in gguf.quants._type_traits:
        _methods = {"dequantize_blocks": staticmethod(_dequantize)}
        type(_name, (gguf.quants.__Quant,), _methods, qtype=GGMLQuantizationType[_name])
