"""Writes GGUF files, version 3, one tensor at a time (the layout is in `gguf_header`).

The header's length does not depend on the types, so it is written last: a tensor's type may change
while it is written. Tensors follow each other in the order of the header, without gaps, as ggml's
reader requires.
"""
import math
import struct
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...ops.formats.base import FORMATS
from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import PLAIN_DTYPES, safe_repr
from .atomic_file import Tensors, WeightsWriter, WriteError
from .gguf import PLAIN_TYPES
from .gguf_header import DEFAULT_ALIGNMENT, MAGIC

MAX_NAME_BYTES = 127  # ggml.h GGML_MAX_NAME - 1, for the terminating zero
MAX_DIMENSIONS = 4  # ggml.h GGML_MAX_DIMS
ROW = 256  # row length of a tensor that is reshaped because blocks do not divide its rows
QUANTIZATION_VERSION = 2  # ggml.h GGML_QNT_VERSION
TYPE_NUMBERS = {name: number for number, name in PLAIN_TYPES.items()}

# `general.file_type` by the type with the most bytes (llama.h `llama_ftype`).
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23,
    "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37
}

Value = str | bool | int | float | Sequence[int] | Sequence[str]


def type_number(type_name: str) -> int:
    """Returns ggml's number of a packed format (key of `FORMATS`) or plain type.

    Raises:
        WriteError: GGUF has no such type.
    """
    packed = FORMATS.get(type_name)
    number = packed.ggml_type if packed is not None else None
    if number is None:
        number = TYPE_NUMBERS.get(type_name)
    if number is None:
        raise WriteError(
            f"GGUF files cannot hold weights of the type {type_name}. Pick a type of GGUF, or a"
            " safetensors file."
        )
    return number


class _Layout:
    """The content of a file: its metadata, with the shapes that ggml cannot store, and its size.

    Attributes:
        tensors: name -> (logical shape, type).
        stored: name -> shape in the header.
        metadata: key -> value.
        start: position of the data.
        size: bytes of the whole file.
    """

    def __init__(self, tensors: Tensors, metadata: Mapping[str, Value]):
        self.tensors = dict(tensors)
        long = [name for name in self.tensors if len(name.encode()) > MAX_NAME_BYTES]
        if long:
            others = f", and {len(long) - 1} more are too long" if long[1:] else ""
            raise WriteError(
                f"GGUF readers take names of up to {MAX_NAME_BYTES} bytes; {safe_repr(long[0])} has"
                f" {len(long[0].encode())}{others}. Save the model as safetensors (NF4) instead.")
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
        """Returns the header; written: name -> (type, offset from the start of the data)."""
        infos = [
            _string(name) + _dimensions(self.stored[name]) +
            struct.pack("<IQ", type_number(type_name), offset)
            for name, (type_name, offset) in written.items()
        ]
        entries = [_string(key) + _value(value) for key, value in self.metadata.items()]
        counts = struct.pack("<IQQ", 3, len(infos), len(entries))
        return MAGIC + counts + b"".join(entries) + b"".join(infos)


class GGUFWriter(WeightsWriter):
    """Writes the tensors of a GGUF file."""

    layout_class = _Layout

    def write(self, name: str, type_name: str, pieces: Iterable[torch.Tensor]):
        """Writes the next tensor.

        Args:
            name: its name, the next one of the layout.
            type_name: its type, which may differ from the planned one.
            pieces: its rows in order, as packed or plain tensors of that type on the CPU.
        """
        expected = list(self.layout.tensors)[len(self.written)]
        if name != expected:
            raise ValueError(f"{name} is written before {expected}.")
        shape, _ = self.layout.tensors[name]
        nbytes = _nbytes(shape, type_name)
        offset = self.file.tell() - self.layout.start
        written = sum(self.put(piece._qdata if is_packed(piece) else piece) for piece in pieces)
        if written != nbytes:
            raise ValueError(
                f"{name} of shape {[*shape]} is {nbytes} bytes in {type_name}, not {written}.")
        self.file.write(bytes(-written % DEFAULT_ALIGNMENT))
        self.written[name] = type_name, offset


def _nbytes(shape: Sequence[int], type_name: str) -> int:
    """Returns the bytes of a tensor of a logical shape, without padding."""
    values, packed = math.prod(shape), FORMATS.get(type_name)
    if packed and values % packed.block_length:
        raise WriteError(
            f"{type_name} packs blocks of {packed.block_length} values, into which the shape"
            f" {tuple(shape)} cannot be divided."
        )
    return packed.nbytes(values) if packed else values * PLAIN_DTYPES[type_name].itemsize


def _stored_shape(shape: Sequence[int], type_name: str) -> Sequence[int]:
    """Returns `shape` itself if ggml can store it, else a shape with the same number of values.

    If blocks do not divide the rows, these become rows of 256 values, as in ComfyUI-GGUF's files,
    or of one block. Dimensions beyond four are merged into the last.
    """
    block_length = FORMATS[type_name].block_length if type_name in FORMATS else 1
    values = math.prod(shape)
    if shape and shape[-1] % block_length:
        row = ROW if values % ROW == ROW % block_length == 0 else block_length
        return values // row, row
    if len(shape) <= MAX_DIMENSIONS:
        return shape
    return (*shape[:MAX_DIMENSIONS - 1], math.prod(shape[MAX_DIMENSIONS - 1:]))


def _dimensions(shape: Sequence[int]) -> bytes:
    """Returns rank and sizes, innermost first; a scalar becomes [1]."""
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
    texts = [item for item in value if isinstance(item, str)]
    if texts:
        return struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(map(_string, texts))
    # ComfyUI-GGUF reads shapes as INT32.
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


gguf_writer, file_size = GGUFWriter.open, GGUFWriter.file_size
