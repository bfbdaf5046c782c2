"""Reads the header of a GGUF file, version 2 or 3, little endian.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

| part | content |
|---|---|
| header | "GGUF", u32 version, u64 tensor count, u64 metadata count |
| metadata | each: string key, u32 value type, value |
| tensors | each: string name, u32 rank, u64 sizes (innermost first), u32 ggml type, u64 offset |
| data | at the next multiple of `general.alignment`; offsets count from here |

A string is u64 length and bytes; an array is u32 item type, u64 count and items. Opening a file
reads only the header, skips over the metadata without decoding it, and checks every count and
length against the remaining bytes, so a damaged file costs neither memory nor time.
"""
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..container.weight_file import MappedFile, WeightFileError, map_file, safe_repr

MAGIC = b"GGUF"

# Metadata value types.
SCALARS = {value_type: struct.Struct("<" + code) for value_type, code in {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}.items()}
STRING, ARRAY = 8, 9

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
ARRAY_HEAD = struct.Struct("<IQ")

DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 8  # ggml computes with four; converters store the five of video models too
MAX_ELEMENTS = (1 << 63) - 1
MAX_NAME_BYTES = (1 << 16) - 1  # of a metadata key, by the specification
# Metadata entries, tensors and strings in one header. The largest known headers hold a million;
# without a limit a damaged count would be followed through gigabytes of weights.
MAX_ITEMS = 1 << 24


class TensorInfo(NamedTuple):
    """A tensor as the header describes it.

    Attributes:
        name: name in the file.
        shape: outermost dimension first.
        ggml_type: ggml's number of the type.
        offset: bytes from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class _Metadata(Mapping):
    """Key -> value, decoded from the mapped file at each access and not kept.

    Values are Python's int, float, bool, str, or a list of these. A byte that is not UTF-8 reads as
    \\xNN, so a wrongly encoded author name does not stop a model and distinct tokens stay distinct.
    """

    def __init__(self, buffer: MappedFile, positions: dict[str, int]):
        self._buffer = buffer
        self._positions = positions

    def __getitem__(self, key: str) -> Any:
        position = self._positions[key]
        value_type = self._number(U32, position)
        position += U32.size
        if value_type in SCALARS:
            return self._number(SCALARS[value_type], position)
        if value_type == STRING:
            return next(self._strings(position, 1))
        item_type, count = ARRAY_HEAD.unpack_from(self._buffer, position)
        position += ARRAY_HEAD.size
        if item_type == STRING:
            return list(self._strings(position, count))
        layout = f"<{count}{SCALARS[item_type].format[1:]}"
        return list(struct.unpack_from(layout, self._buffer, position))

    def _number(self, layout: struct.Struct, position: int):
        return layout.unpack_from(self._buffer, position)[0]

    def _strings(self, position: int, count: int) -> Iterator[str]:
        for _ in range(count):
            end = position + 8 + self._number(U64, position)
            yield str(self._buffer[position + 8:end], "utf-8", "backslashreplace")
            position = end

    def __contains__(self, key) -> bool:  # the inherited method decodes the value
        return key in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


class GGUFHeader:
    """The header of one GGUF file, checked against the file's size.

    Attributes:
        path: the file.
        buffer: its mapped bytes.
        size: its size in bytes.
        metadata: key -> value.
        tensors: descriptions of the tensors, in the order of the file.
        alignment: `general.alignment`.
        data_start: position of the first tensor's data.
    """

    def __init__(self, path: Path):
        self.path = path
        self.buffer = map_file(path)
        self.size = len(self.buffer)
        self.position = 0
        self.item_count = 0
        self._read_version()
        tensor_count = self._read_count("tensors", 24)
        metadata_count = self._read_count("metadata entries", 13)
        self.metadata = _Metadata(self.buffer, self._read_metadata(metadata_count))
        self.tensors = [self._read_tensor(index) for index in range(tensor_count)]
        self.alignment = self._read_alignment()
        self.data_start = -(-self.position // self.alignment) * self.alignment

    def error(self, problem: str) -> WeightFileError:
        return WeightFileError(f"{self.path.name}: {problem}")

    def damage_error(self, problem: str) -> WeightFileError:
        return self.error(
            f"{problem}. The file is damaged or its download incomplete; download it again.")

    def _skip(self, nbytes: int, what: str) -> int:
        """Skips `nbytes` bytes and returns their position."""
        start = self.position
        if nbytes > self.size - start:
            raise self._truncation_error(what)
        self.position = start + nbytes
        return start

    def _truncation_error(self, what: str) -> WeightFileError:
        return self.damage_error(f"the file ends at byte {self.size}, inside {what}")

    def _read(self, layout: struct.Struct, what: str):
        return layout.unpack_from(self.buffer, self._skip(layout.size, what))

    def _read_count(self, items: str, min_bytes: int) -> int:
        """Reads a number of items from the header and checks it.

        Args:
            items: name of the items, for messages.
            min_bytes: least size of one item.
        """
        (count,) = self._read(U64, "the header")
        self._check_count(count, items, min_bytes, "the header")
        return count

    def _check_count(self, count: int, items: str, min_bytes: int, what: str):
        remaining = self.size - self.position
        self.item_count += count
        if count * min_bytes > remaining or self.item_count > MAX_ITEMS:
            raise self.damage_error(
                f"{what} announces {count} {items}, more than {remaining} bytes can hold or any"
                " model has"
            )

    def _read_name(self, what: str) -> str:
        (length,) = self._read(U64, f"the name of {what}")
        if length > MAX_NAME_BYTES:
            raise self.damage_error(
                f"the name of {what} is {length} bytes long; at most {MAX_NAME_BYTES} are allowed")
        start = self._skip(length, f"the name of {what}")
        try:
            return str(self.buffer[start:start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.damage_error(f"the name of {what} is not UTF-8 text") from None

    def _read_version(self):
        self._skip(4, "the first four bytes")
        if self.buffer[:4] != MAGIC:
            raise self.damage_error("it does not begin with 'GGUF'")
        (version,) = self._read(U32, "the version")
        if version and version % (1 << 16) == 0:
            raise self.error(
                "it is a big-endian GGUF file. Get the little-endian version, which is the usual"
                " one."
            )
        if version not in (2, 3):
            raise self.error(
                f"it is GGUF version {version}; versions 2 and 3 are supported. Get a newer"
                " conversion of the model, or update this pack.")

    def _read_metadata(self, count: int) -> dict[str, int]:
        positions: dict[str, int] = {}
        for index in range(count):
            key = self._read_name(f"metadata entry {index}")
            if key in positions:
                raise self.damage_error(f"the metadata holds {safe_repr(key)} twice")
            positions[key] = self.position
            self._skip_value(f"the metadata value {safe_repr(key)}")
        return positions

    def _skip_value(self, what: str):
        (value_type,) = self._read(U32, what)
        item_type, count = value_type, 1
        if value_type == ARRAY:
            item_type, count = self._read(ARRAY_HEAD, what)
        if item_type in SCALARS:
            self._skip(count * SCALARS[item_type].size, what)
        elif item_type == STRING:
            self._check_count(count, "strings", 8, what)
            self._skip_strings(count, what)
        elif item_type == ARRAY:
            raise self.error(
                f"{what} is an array of arrays, which ggml does not read either. Get another"
                " conversion."
            )
        else:
            raise self.damage_error(
                f"{what} has the unknown type {item_type}; types 0 to 12 are supported")

    def _skip_strings(self, count: int, what: str):
        # Local variables for speed: vocabularies have hundreds of thousands of strings.
        buffer, read_length = self.buffer, U64.unpack_from
        position, last = self.position, self.size - 8
        for _ in range(count):
            if position > last:
                raise self._truncation_error(what)
            position += 8 + read_length(buffer, position)[0]
        self._skip(position - self.position, what)

    def _read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damage_error(
                f"general.alignment is {safe_repr(alignment)}; it must be a power of two")
        return alignment

    def _read_tensor(self, index: int) -> TensorInfo:
        name = self._read_name(f"tensor {index}")
        what = f"the description of tensor {safe_repr(name)}"
        (rank,) = self._read(U32, what)
        if rank > MAX_DIMENSIONS:
            raise self.damage_error(
                f"tensor {safe_repr(name)} has {rank} dimensions; at most {MAX_DIMENSIONS} are"
                " supported"
            )
        shape = self._read(struct.Struct(f"<{rank}Q"), what)[::-1]
        if extent(shape) > MAX_ELEMENTS:
            raise self.damage_error(
                f"tensor {safe_repr(name)} of shape {shape} has more elements than any file can"
                " hold"
            )
        (ggml_type,) = self._read(U32, what)
        (offset,) = self._read(U64, what)
        return TensorInfo(name, shape, ggml_type, offset)


def extent(shape: Sequence[int]) -> int:
    """Returns the elements of a shape, with dimensions of size 0 counted as 1."""
    return prod(max(size, 1) for size in shape)
