"""safetensors files with 4-bit weights as bitsandbytes keeps them, written one tensor at a time
(`safetensors` has the layout).

A packed weight `X` is five tensors, as in Forge's checkpoints: `X` uint8 (bytes, 1), `X.absmax`
float32, `X.quant_map` float32 (16,) and `X.quant_state.bitsandbytes__nf4`, JSON as uint8
(bitsandbytes 0.50 `functional.QuantState.as_dict`).

safetensors' own `save_file` wants all of a model in memory.
"""
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from ...ops.format import FORMATS
from ...ops.packed_layout import is_packed, packed_tensors
from .atomic_file import WeightsWriter, WriteError, new_weights
from .bitsandbytes import QUANT_TYPES
from .container import PLAIN_DTYPES
from .safetensors import SafetensorsFile

NAMES = {packed.__name__: quant_type for quant_type, packed in QUANT_TYPES.items()}
DTYPES = {dtype: name for name, dtype in SafetensorsFile.dtypes.items()}
ALIGNMENT = 8  # of the data, so that readers may use it where it lies
WIDEST = 10 ** 15  # more than any offset


def parts_of(name: str, shape: Sequence[int],
             type_name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors in the file that one weight is kept in: name -> (dtype, shape). Raises WriteError
    for other packed types."""
    if type_name in PLAIN_DTYPES or type_name in SafetensorsFile.dtypes:
        return {name: (type_name, tuple(shape))}
    if type_name not in NAMES:
        raise WriteError(
            f"Safetensors files hold no weights of the type {type_name}, which {name} would have."
            " Pick NF4, or a GGUF file.")
    values = math.prod(shape)
    state = _quant_state(shape, type_name)
    return {
        name: ("U8", (-(-values // 2), 1)),
        f"{name}.absmax": ("F32", (-(-values // FORMATS[type_name].block_length),)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.quant_state.bitsandbytes__{NAMES[type_name]}": ("U8", (len(state),)),
    }


def file_size(tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str, str]) -> int:
    """Bytes of a whole file. tensors: name -> (logical shape, type)."""
    return _Layout(tensors, metadata).size


def safetensors_writer(path: str | os.PathLike, tensors: Mapping[str, tuple[Sequence[int], str]],
                       metadata: Mapping[str, str],
                       overwrite: bool = False) -> AbstractContextManager["SafetensorsWriter"]:
    """As `gguf_writer`."""
    return new_weights(path, SafetensorsWriter, _Layout(tensors, metadata), overwrite)


class SafetensorsWriter(WeightsWriter):
    def write(self, name: str, type_name: str, pieces: Iterable[torch.Tensor]):
        """The next tensor: packed tensors or plain ones on the CPU, rows below each other, of the
        type that is named."""
        shape, _ = self.layout.tensors[name]
        parts = parts_of(name, shape, type_name)
        if len(parts) == 1:
            return self._write(name, parts, pieces)
        scales = []

        def codes():
            for piece in pieces:
                if not is_packed(piece):
                    raise ValueError(f"A part of {name} is not packed.")
                data, scale = packed_tensors(piece)
                scales.append(scale)
                yield data

        code_name, *others = parts
        state = torch.frombuffer(bytearray(_quant_state(shape, type_name)), dtype=torch.uint8)
        self._write(code_name, parts, codes())
        for part, tensors in zip(
                others,
            (scales, [torch.tensor(FORMATS[type_name].codebook, dtype=torch.float32)], [state])):
            self._write(part, parts, tensors)

    def _write(self, name: str, parts: Mapping[str, tuple[str, tuple[int, ...]]],
               pieces: Iterable[torch.Tensor]):
        dtype, shape = parts[name]
        first = self.file.tell() - self.layout.start
        done, wanted = sum(map(self.put, pieces)), _nbytes(dtype, shape)
        if done != wanted:
            raise ValueError(f"{name} of shape {shape} is {wanted} bytes of {dtype}, not {done}.")
        self.written[name] = _entry(dtype, shape, first, first + done)


class _Layout:
    """What a file will hold, and where the data begins: behind a header that has room for the
    longest of its kind."""

    def __init__(self, tensors: Mapping[str, tuple[Sequence[int], str]], metadata: Mapping[str,
                                                                                           str]):
        self.tensors = dict(tensors)
        self.metadata = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        }
        parts = {
            part: found for name, tensor in self.tensors.items()
            for part, found in parts_of(name, *tensor).items()
        }
        longest = {
            part: _entry("F8_E4M3", shape, WIDEST, WIDEST) for part, (_, shape) in parts.items()
        }
        self.start = -(-(8 + len(self._json(longest))) // ALIGNMENT) * ALIGNMENT
        self.size = self.start + sum(_nbytes(*part) for part in parts.values())

    def header(self, entries: Mapping[str, dict]) -> bytes:
        text = self._json(entries)
        return (self.start - 8).to_bytes(8, "little") + text.ljust(self.start - 8)

    def _json(self, entries: Mapping[str, dict]) -> bytes:
        return json.dumps({"__metadata__": self.metadata, **entries},
                          separators=(",", ":")).encode()


def _entry(dtype: str, shape: Sequence[int], first: int, last: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * SafetensorsFile.dtypes[dtype].itemsize


def _quant_state(shape: Sequence[int], type_name: str) -> bytes:
    # The dtype is what readers compute in that have no dtype of their own.
    state = {
        "quant_type": NAMES[type_name], "blocksize": FORMATS[type_name].block_length,
        "dtype": "bfloat16", "shape": list(shape)
    }
    return json.dumps(state).encode()
