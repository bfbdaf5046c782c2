"""Writes safetensors files of packed weights, one weight at a time.

`safetensors` has the layout of the file. A weight `X` of NF4 is four tensors, as in Forge's
checkpoints: `X` uint8 (bytes, 1), `X.absmax` float32, `X.quant_map` float32 (16,) and
`X.quant_state.bitsandbytes__nf4`, JSON as uint8 (bitsandbytes 0.50
`functional.QuantState.as_dict`). A weight `L.weight` in a format of ComfyUI's own has the parts of
`layer_parts`, and `L.comfy_quant`, JSON as uint8; of INT4_PRODUCT without its LINEAR_DTYPE. These
are at the end of the file, where their odd lengths leave other tensors aligned. safetensors' own
`save_file` needs the whole model in memory.
"""
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...ops.formats.base import FORMATS
from ...ops.packing.pack_types import ROW_TYPES
from ...ops.tensor.packed_layout import is_packed, packed_tensor, packed_tensors
from ...ops.tensor.packed_tensor import PackedTensor
from ...ops.tensor.row_slicing import join_rows
from ..quantizers.bitsandbytes import QUANT_TYPES
from ..quantizers.comfy_quant import layer_parts
from ..quantizers.comfy_quant_formats import LINEAR_DTYPE
from ..quantizers.comfy_quant_marks import MARK, mark_of
from .atomic_file import Tensors, WeightsWriter, WriteError
from .safetensors import SafetensorsFile

QUANT_NAMES = {packed.name: quant_type for quant_type, packed in QUANT_TYPES.items()}
PACKED_TYPES = QUANT_NAMES.keys() | ROW_TYPES.keys()
# In place of convrot_w4a4, in a file: ComfyUI rounds the inputs of such layers to 4 bits too.
INT4_PRODUCT = "convrot_w4a4 int4"
FILE_TYPES = {**{name: name for name in ROW_TYPES}, INT4_PRODUCT: "convrot_w4a4"}
DTYPES = {dtype: name for name, dtype in SafetensorsFile.dtypes.items()}
ALIGNMENT = 8  # of the data, so that readers can map it
MAX_OFFSET = 10 ** 15  # reserves the digits of any offset

Parts = dict[str, tuple[str, tuple[int, ...]]]  # name in the file -> (dtype, shape)


def parts_of(name: str, shape: Sequence[int], type_name: str) -> Parts:
    """Returns the tensors in the file that make up one weight.

    Raises:
        WriteError: safetensors files cannot hold weights of this type.
    """
    if type_name in SafetensorsFile.dtypes:
        return {name: (type_name, tuple(shape))}
    if type_name in FILE_TYPES:
        weight = _empty_weight(shape, FILE_TYPES[type_name])
        return {part: (DTYPES[tensor.dtype], tuple(tensor.shape))
                for part, tensor in _layer_tensors(name, weight, type_name).items()}
    if type_name not in QUANT_NAMES:
        raise WriteError(
            f"Safetensors files cannot hold weights of the type {type_name}, which is planned for"
            f" {name}. Pick NF4 or one of ComfyUI's own formats, or a GGUF file.")
    values = math.prod(shape)
    state = _quant_state(shape, type_name)
    return {
        name: ("U8", (-(-values // 2), 1)),
        f"{name}.absmax": ("F32", (-(-values // FORMATS[type_name].block_length),)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.quant_state.bitsandbytes__{QUANT_NAMES[type_name]}": ("U8", (len(state),)),
    }


class _Layout:
    """The content of a file and its size; the header has room for the longest possible offsets.

    Attributes:
        tensors: name -> (logical shape, type).
        metadata: key -> value.
        start: position of the data.
        size: bytes of the whole file.
    """

    def __init__(self, tensors: Tensors, metadata: Mapping[str, str]):
        self.tensors = dict(tensors)
        self.metadata = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata.items()
        }
        parts: Parts = {}
        for name, tensor in self.tensors.items():
            parts |= parts_of(name, *tensor)
        longest = {
            part: _entry("F8_E4M3", shape, MAX_OFFSET, MAX_OFFSET)
            for part, (_, shape) in parts.items()
        }
        self.start = -(-(8 + len(self._json(longest))) // ALIGNMENT) * ALIGNMENT
        self.size = self.start + sum(_nbytes(*part) for part in parts.values())

    def header(self, entries: Mapping[str, dict]) -> bytes:
        """Returns the bytes before the data; entries: name in the file -> its header entry."""
        text = self._json(entries)
        return (self.start - 8).to_bytes(8, "little") + text.ljust(self.start - 8)

    def _json(self, entries: Mapping[str, dict]) -> bytes:
        return json.dumps({"__metadata__": self.metadata, **entries},
                          separators=(",", ":")).encode()


class SafetensorsWriter(WeightsWriter):
    """Writes the tensors of a safetensors file."""

    layout_class = _Layout

    def __init__(self, file, layout):
        super().__init__(file, layout)
        self._marks: dict[str, torch.Tensor] = {}

    def write(self, name: str, type_name: str, pieces: Iterable[torch.Tensor]):
        """Writes the next tensor, with the arguments of `GGUFWriter.write`."""
        shape, file_type = self.layout.tensors[name]
        if type_name in FILE_TYPES:
            return self._write_layer(name, join_rows(list(pieces)), file_type)
        parts = parts_of(name, shape, type_name)
        if len(parts) == 1:
            return self._write(name, parts, pieces)
        scales = []

        def codes():
            for piece in pieces:
                if not is_packed(piece):
                    raise ValueError(f"A piece of {name} is not packed.")
                data, scale = packed_tensors(piece)
                scales.append(scale)
                yield data

        code_name, *other_names = parts
        packed_format = QUANT_TYPES[QUANT_NAMES[type_name]]
        codebook = torch.tensor(packed_format.codebook, dtype=torch.float32)
        state = torch.frombuffer(bytearray(_quant_state(shape, type_name)), dtype=torch.uint8)
        self._write(code_name, parts, codes())
        for part, tensors in zip(other_names, (scales, [codebook], [state])):
            self._write(part, parts, tensors)

    def finish(self):
        for name, mark in self._marks.items():
            self._write_tensor(name, mark)
        super().finish()

    def _write_layer(self, name: str, weight: torch.Tensor, file_type: str):
        """Writes a weight in a format of ComfyUI's own; its settings wait for `finish`."""
        if not is_packed(weight):
            raise ValueError(f"{name} is not packed.")
        for part, tensor in _layer_tensors(name, weight, file_type).items():
            if part.endswith(MARK):
                self._marks[part] = tensor
            else:
                self._write_tensor(part, tensor)

    def _write_tensor(self, name: str, tensor: torch.Tensor):
        part = DTYPES[tensor.dtype], tuple(tensor.shape)
        self._write(name, {name: part}, [tensor])

    def _write(self, name: str, parts: Parts, pieces: Iterable[torch.Tensor]):
        dtype, shape = parts[name]
        nbytes = _nbytes(dtype, shape)
        first = self.file.tell() - self.layout.start
        written = sum(map(self.put, pieces))
        if written != nbytes:
            raise ValueError(
                f"{name} of shape {shape} is {nbytes} bytes of {dtype}, not {written}.")
        self.written[name] = _entry(dtype, shape, first, first + written)


def _empty_weight(shape: Sequence[int], type_name: str) -> PackedTensor:
    """Returns a weight of a row type without values, on the meta device."""
    packed_format, rows = ROW_TYPES[type_name].format_of(tuple(shape)), shape[0]
    data, *qparams = (torch.empty(count, dtype=dtype, device="meta") for count, dtype in (
        (rows * packed_format.block_bytes, torch.uint8),
        *((qparam.length(rows), qparam.dtype) for qparam in packed_format.qparams)))
    return packed_tensor(packed_format, data, shape, torch.float32, *qparams)


def _layer_tensors(name: str, weight: PackedTensor, type_name: str) -> dict[str, torch.Tensor]:
    """Returns name in the file -> tensor of a weight in a format of ComfyUI's own.

    type_name: of FILE_TYPES.
    """
    settings, parts = layer_parts(weight)
    if type_name == INT4_PRODUCT:
        del settings[LINEAR_DTYPE]
    layer = name.removesuffix(".weight")
    tensors = {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    return tensors | {f"{layer}{MARK}": mark_of(settings)}


def _entry(dtype: str, shape: Sequence[int], first: int, last: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * SafetensorsFile.dtypes[dtype].itemsize


def _quant_state(shape: Sequence[int], type_name: str) -> bytes:
    state = {
        "quant_type": QUANT_NAMES[type_name],
        "blocksize": FORMATS[type_name].block_length,
        "dtype": "bfloat16",  # for readers that do not choose a dtype to compute in
        "shape": list(shape),
    }
    return json.dumps(state).encode()


safetensors_writer, file_size = SafetensorsWriter.open, SafetensorsWriter.file_size
