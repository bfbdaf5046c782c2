"""GGUF models: types, shapes and positions of their tensors, checked against the files.

`gguf_header` reads a file's header, `gguf_split` finds the other files of a split model.
"""
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...ops import formats  # noqa: F401  registers the packed formats
from ...ops.formats.base import FORMATS, GGML_FORMATS, Format
from ..container.weight_file import (
    PLAIN_DTYPES,
    ProgressIter,
    TensorEntry,
    WeightFile,
    WeightFileError,
    safe_repr,
)
from ..quantizers import leftover_scales, scaled_weights
from ..quantizers.base import join_weights
from ..quantizers.comfy_quant_marks import marked_layers
from ..quantizers.judgement import judged
from ..quantizers.lost_marks import restore_marks
from .gguf_header import MAGIC, MAX_DIMENSIONS, MAX_ELEMENTS, GGUFHeader, TensorInfo, extent
from .gguf_marks import marks_as_metadata
from .gguf_split import split_headers

PLAIN_TYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}

# ggml types (ggml.h) that are not or no longer used in files, named in the message about them.
UNSTORED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 143: "PTQ1_0 of PrismML",
}
Q2_0_TYPE = next(number for number, packed in GGML_FORMATS.items() if packed is FORMATS["Q2_0"])
# Prefix of metadata that marks models with rotated weights: their layers rotate the input too.
ROTATION = "prism.hadamard."


class GGUFFile(WeightFile):
    """A GGUF model in one file, or split (`name-00001-of-00003.gguf`, opened by any of its files).

    Logical shapes are the stored ones reversed, or `comfy.gguf.orig_shape.<name>` if the metadata
    has it. If several files have the same metadata key, the first file's value is used. Marks of
    ComfyUI's own formats (`gguf_marks`) are in the metadata as in safetensors.

    Raises:
        WeightFileError: a file is damaged, incomplete or in a type that is not supported.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        headers = split_headers(GGUFHeader(path))
        metadata = ChainMap(
            *(header.metadata for header in headers))  # pyright: ignore[reportArgumentType]
        if rotation := next((key for key in metadata if key.startswith(ROTATION)), None):
            raise WeightFileError(
                f"{path.name}: its weights are rotated ({safe_repr(rotation)} in its metadata),"
                f" and only the llama.cpp of PrismML rotates the inputs of its layers to match."
                " Get a conversion of the model that is not rotated."
            )
        formats_by_type = _formats_by_type(headers)
        entries: dict[str, TensorEntry] = {}
        for part, header in enumerate(headers):
            for entry in _entries(header, metadata, part, formats_by_type):
                if entry.name in entries:
                    raise header.damage_error(
                        f"there are two tensors named {safe_repr(entry.name)}")
                entries[entry.name] = entry
        paths = [header.path for header in headers]
        buffers = [header.buffer for header in headers]
        shapes = {name: entry.shape for name, entry in entries.items()}
        marks = marks_as_metadata(path.name, metadata, shapes)
        if marks:
            metadata = ChainMap(marks, *metadata.maps)  # pyright: ignore[reportArgumentType]
        super().__init__(path, paths, buffers, metadata, entries)

    @staticmethod
    def recognises(head: bytes) -> bool:
        """Returns whether a file with these first bytes is of this container."""
        return head.startswith(MAGIC)

    def state_dict(self, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
        """Returns `WeightFile.state_dict`, multiplied by separate scales.

        Weights that are marked as ComfyUI's stay in parts, with scales in float32, which its own
        layers take.
        """
        tensors = super().state_dict(track)
        for layer in marked_layers(self.metadata, tensors):
            scale = tensors.get(f"{layer}.weight_scale")
            if scale is not None and scale.dtype == torch.float16:
                tensors[f"{layer}.weight_scale"] = scale.float()
        with judged(self, tensors):
            restore_marks(self, tensors)
            join_weights((scaled_weights.QUANTIZER, leftover_scales.QUANTIZER), self, tensors)
        return tensors

    @property
    def declared_type(self) -> str:
        """`general.type` such as "adapter" or "mmproj"; for a "model" `general.architecture`."""
        general_type = self.metadata.get("general.type", "model")
        if general_type != "model":
            return str(general_type)
        return str(self.metadata.get("general.architecture", ""))


def _formats_by_type(headers: list[GGUFHeader]) -> Mapping[int, Format]:
    """Returns ggml type -> packed format for the files of one model.

    Early files of PrismML use the number of Q2_0 for their PQ2_0. Its tensors are smaller, and no
    file has gaps between tensors, so the format is the one that fits more tensors of that type.

    Raises:
        WeightFileError: both formats fit equally many.
    """
    candidates = [FORMATS["Q2_0"], FORMATS["PQ2_0"]]
    matches = [0, 0]
    for header in headers:
        if not any(tensor.ggml_type == Q2_0_TYPE for tensor in header.tensors):
            continue
        ends = sorted(
            {*(tensor.offset for tensor in header.tensors), header.size - header.data_start})
        for tensor in header.tensors:
            end = bisect_right(ends, tensor.offset)
            if tensor.ggml_type == Q2_0_TYPE and prod(tensor.shape) and end < len(ends):
                space = ends[end] - tensor.offset
                for index, packed in enumerate(candidates):
                    if _fills(packed, tensor.shape, space, header.alignment):
                        matches[index] += 1
    if matches[0] == matches[1] > 0:
        raise WeightFileError(
            f"{headers[0].path.name}: its tensors of the ggml type {Q2_0_TYPE} are too small to"
            " tell whether they are in llama.cpp's Q2_0 or in PrismML's, which has the same"
            " number. Get the model in another type."
        )
    return {**GGML_FORMATS, Q2_0_TYPE: candidates[1 if matches[1] > matches[0] else 0]}


def _fills(packed: Format, shape: tuple[int, ...], space: int, alignment: int) -> bool:
    """Returns whether a tensor of this shape in this format takes `space` bytes with padding."""
    if not shape or shape[-1] % packed.block_length:
        return False
    nbytes = prod(shape) // packed.block_length * packed.block_bytes
    return nbytes <= space < nbytes + alignment


def _entries(header: GGUFHeader, metadata: Mapping[str, Any], part: int,
             formats_by_type: Mapping[int, Format]) -> list[TensorEntry]:
    """Returns the tensors of one file in its order, with the logical shapes from `metadata`."""
    entries = [_entry(header, tensor, metadata, part, formats_by_type) for tensor in header.tensors]
    _check_layout(header, entries)
    return entries


def _entry(header: GGUFHeader, tensor: TensorInfo, metadata: Mapping[str, Any], part: int,
           formats_by_type: Mapping[int, Format]) -> TensorEntry:
    name, shape = tensor.name, tensor.shape
    if tensor.ggml_type in PLAIN_TYPES:
        format_name, block_length = PLAIN_TYPES[tensor.ggml_type], 1
        block_bytes = PLAIN_DTYPES[format_name].itemsize
    elif tensor.ggml_type in formats_by_type:
        packed = formats_by_type[tensor.ggml_type]
        format_name = packed.name
        block_length, block_bytes = packed.block_length, packed.block_bytes
    else:
        supported = [*PLAIN_TYPES.values(), *(packed.name for packed in GGML_FORMATS.values())]
        type_name = UNSTORED_TYPES.get(tensor.ggml_type, "unknown")
        raise header.error(
            f"tensor {safe_repr(name)} has the ggml type {tensor.ggml_type} ({type_name}), which"
            f" cannot be read. Supported are {', '.join(supported)}. Get the model in one of these"
            " types, or update this pack.")
    row_length = shape[-1] if shape else 1
    if row_length % block_length:
        raise header.damage_error(
            f"tensor {safe_repr(name)} of shape {shape} is {format_name}, whose blocks of"
            f" {block_length} values do not divide its rows")
    if tensor.offset % header.alignment:
        raise header.damage_error(
            f"tensor {safe_repr(name)} has the offset {tensor.offset}, not a multiple of the"
            f" alignment {header.alignment}"
        )

    logical = _original_shape(header, name, shape, metadata)
    stored = logical if logical and logical[-1] % block_length == 0 else shape
    nbytes = prod(shape) // block_length * block_bytes
    return TensorEntry(name, logical, stored, format_name, header.data_start + tensor.offset,
                       nbytes, part)


def _original_shape(header: GGUFHeader, name: str, shape: tuple[int, ...],
                    metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape before conversion if ComfyUI-GGUF's converter had to reshape a tensor."""
    original = metadata.get(f"comfy.gguf.orig_shape.{name}")
    if original is None:
        return shape
    if (
        not isinstance(original, list)
        or len(original) > MAX_DIMENSIONS
        or not all(isinstance(size, int) and size >= 0 for size in original)
        or prod(original) != prod(shape)
        or extent(original) > MAX_ELEMENTS
    ):
        raise header.error(
            f"the metadata gives tensor {safe_repr(name)} the shape {safe_repr(original)}, which"
            f" does not hold the {prod(shape)} elements of its stored shape {shape}. Get another"
            " conversion of the model."
        )
    return tuple(original)


def _check_layout(header: GGUFHeader, entries: list[TensorEntry]):
    """Raises WeightFileError unless all tensors are inside the file and none overlap."""
    if not entries:
        return
    end = max(entry.offset + entry.nbytes for entry in entries)
    if end > header.size:
        # Beyond the size of a complete file, an offset is wrong; up to it, the file is truncated.
        complete_size = header.data_start + sum(
            -(-entry.nbytes // header.alignment) * header.alignment for entry in entries
        )
        if end > complete_size:
            last = max(entries, key=lambda entry: entry.offset + entry.nbytes)
            raise header.damage_error(
                f"tensor {safe_repr(last.name)} should be at bytes {last.offset} to {end}, outside"
                f" the file of {header.size} bytes")
        raise header.error(
            f"{end - header.size} bytes are missing: the tensors end at byte {end}, the file at"
            f" byte {header.size}. Its download is probably incomplete; download it again.")
    for before, after in pairwise(sorted(entries, key=lambda entry: (entry.offset, entry.nbytes))):
        if before.offset + before.nbytes > after.offset:
            raise header.damage_error(
                f"the tensors {safe_repr(before.name)} and {safe_repr(after.name)} overlap")
