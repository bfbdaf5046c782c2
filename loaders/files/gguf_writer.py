"""GGUF files, version 3, written one tensor at a time (the layout is in `gguf_header`).

A header's length does not depend on the types, so the data comes first and the header last: a
tensor may turn out to need another type of number while it is written. Tensors lie in the order of
the header without gaps, as ggml's reader wants them.
"""
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from ...ops.format import FORMATS
from ...ops.packed_layout import is_packed
from .atomic_file import WeightsWriter, WriteError, new_weights
from .container import nbytes_of, safe_repr
from .gguf import PLAIN_TYPES
from .gguf_header import DEFAULT_ALIGNMENT, MAGIC

MAX_NAME_BYTES = 127  # ggml.h GGML_MAX_NAME, with its zero
MAX_DIMENSIONS = 4  # ggml.h GGML_MAX_DIMS
ROW = 256  # values in a row of a tensor whose own rows blocks do not divide
QUANTIZATION_VERSION = 2  # ggml.h GGML_QNT_VERSION
TYPE_NUMBERS = {name: number for number, name in PLAIN_TYPES.items()}

# `general.file_type` by the type that most bytes are of (llama.h `llama_ftype`).
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23,
    "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37
}

Value = str | bool | int | float | Sequence[int]


def type_number(type_name: str) -> int:
    """ggml's number of a packed format (a key of `FORMATS`) or plain type. Raises WriteError for
    what GGUF does not hold."""
    packed = FORMATS.get(type_name)
    number = (
        TYPE_NUMBERS.get(type_name)
        if packed is None or packed.ggml_type is None
        else packed.ggml_type
    )
    if number is None:
        raise WriteError(
            f"GGUF files hold no weights of the type {type_name}. Pick a type of GGUF, or a"
            " safetensors file."
        )
    return number


def file_size(tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str,
                                                                                  Value]) -> int:
    """Bytes of a whole file. tensors: name -> (logical shape, type)."""
    return _Layout(tensors, metadata).size


def gguf_writer(path: str | os.PathLike, tensors: Mapping[str, tuple[Sequence[int], str]],
                metadata: Mapping[str, Value],
                overwrite: bool = False) -> AbstractContextManager["GGUFWriter"]:
    """`new_weights` in this layout. tensors: name -> (logical shape, planned type), in the order in
    which they will be written."""
    return new_weights(path, GGUFWriter, _Layout(tensors, metadata), overwrite)


class GGUFWriter(WeightsWriter):
    def write(self, name: str, type_name: str, pieces: Iterable[torch.Tensor]):
        """The next tensor: packed tensors or plain ones on the CPU, rows below each other, of the
        type that is named."""
        expected = list(self.layout.tensors)[len(self.written)]
        if name != expected:
            raise ValueError(f"{name} is written before {expected}.")
        shape, _ = self.layout.tensors[name]
        wanted, offset = _nbytes(shape, type_name), self.file.tell() - self.layout.start
        done = sum(self.put(piece._qdata if is_packed(piece) else piece) for piece in pieces)
        if done != wanted:
            raise ValueError(
                f"{name} of shape {[*shape]} is {wanted} bytes in {type_name}, not {done}.")
        self.file.write(bytes(-done % DEFAULT_ALIGNMENT))
        self.written[name] = type_name, offset


class _Layout:
    """What a file will hold: the metadata with the shapes that ggml has no room for, and where the
    data begins."""

    def __init__(self, tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str,
                                                                                           Value]):
        self.tensors = dict(tensors)
        long = [name for name in self.tensors if len(name.encode()) > MAX_NAME_BYTES]
        if long:
            raise WriteError(
                f"GGUF readers take names of up to {MAX_NAME_BYTES} bytes; {safe_repr(long[0])} has"
                f" {len(long[0].encode())}{f', and {len(long) - 1} more are too long' if long[1:] else ''}. Save"
                " the model as safetensors (NF4) instead.")
        self.stored = {name: _stored_shape(*tensor) for name, tensor in self.tensors.items()}
        self.metadata = dict(metadata) | {
            f"comfy.gguf.orig_shape.{name}": list(shape)
            for name, (shape, _) in self.tensors.items()
            if self.stored[name] is not shape
        }
        planned = {name: (type_name, 0) for name, (_, type_name) in self.tensors.items()}
        self.start = _aligned(len(self.header(planned)))
        self.size = self.start + sum(_aligned(_nbytes(*tensor)) for tensor in self.tensors.values())

    def header(self, written: Mapping[str, tuple[str, int]]) -> bytes:
        """written: name -> (type, offset from the start of the data)."""
        infos = [
            _string(name) + _dimensions(self.stored[name]) +
            struct.pack("<IQ", type_number(type_name), offset)
            for name, (type_name, offset) in written.items()
        ]
        entries = [_string(key) + _value(value) for key, value in self.metadata.items()]
        counts = struct.pack("<IQQ", 3, len(infos), len(entries))
        return MAGIC + counts + b"".join(entries) + b"".join(infos)


def _nbytes(shape: Sequence[int], type_name: str) -> int:
    """Return the bytes of a tensor of a logical shape."""
    values, packed = math.prod(shape), FORMATS.get(type_name)
    if packed and values % packed.block_length:
        raise WriteError(
            f"{type_name} packs blocks of {packed.block_length} values; shape {tuple(shape)} does"
            " not divide."
        )
    return nbytes_of(type_name, (values,))


def _stored_shape(shape: Sequence[int], type_name: str) -> Sequence[int]:
    """`shape` itself where ggml can hold it. Dimensions beyond four are folded into the last; what
    is packed in blocks that do not divide its rows is in rows of 256 values, as in ComfyUI-GGUF's
    files, or of one block."""
    length, values = (
        FORMATS[type_name].block_length if type_name in FORMATS else 1,
        math.prod(shape),
    )
    if shape and shape[-1] % length:
        row = ROW if values % ROW == ROW % length == 0 else length
        return values // row, row
    return (
        shape
        if len(shape) <= MAX_DIMENSIONS
        else (*shape[: MAX_DIMENSIONS - 1], math.prod(shape[MAX_DIMENSIONS - 1 :]))
    )


def _dimensions(shape: Sequence[int]) -> bytes:
    """Rank and sizes, innermost first; a scalar is one of size 1."""
    sizes = shape or (1,)
    return struct.pack(f"<I{len(sizes)}Q", len(sizes), *reversed(sizes))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    # ComfyUI-GGUF wants INT32
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
