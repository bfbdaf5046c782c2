"""Imatrix files of llama.cpp and stable-diffusion.cpp: the mean square of each input of a layer.

They are read wherever a measurement is. Unlike a measurement an imatrix holds no products of two
inputs and no costs of layers.

GGUF (llama.cpp since 2025, `general.type` is "imatrix"), for each weight W two F32 tensors:

| tensor    | shape     | meaning                                    |
|-----------|-----------|--------------------------------------------|
| W.in_sum2 | (nmat, K) | sums of squares of the inputs over tokens  |
| W.counts  | (nmat, 1) | tokens; without tokens all columns are 1.0 |

`.dat` (earlier llama.cpp, stable-diffusion.cpp), little endian, without a magic number:

| part    | content                                                                        |
|---------|--------------------------------------------------------------------------------|
| start   | i32 entries                                                                    |
| entries | each: i32 length and name, i32 calls, i32 count and f32 values                 |
| end     | i32 last chunk; i32 length and name of the dataset, not of stable-diffusion.cpp |

Old files have no end.

A value over its calls is the mean square; without calls the values are taken as they are.
"""
import math
import os
import struct
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ....ops.quantize.second_moments import BLOCK, SecondMoments
from ...byte_sizes import size_text
from ...container.weight_file import MappedFile, map_file, safe_repr
from ...files.gguf_header import MAGIC, GGUFHeader
from ...name_lists import join_some
from ..layer_losses import IMATRIX
from .sensitivity import Sensitivity, SensitivityError

SUFFIXES = (".gguf", ".dat")
SUMS, COUNTS = ".in_sum2", ".counts"
F32 = 0  # ggml's number of the type
CUT = 63  # bytes of a name that ggml keeps
# What files put before the host's names of a model's weights.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.")
# Limits that no model reaches: Flux.1 has 504 matrices with inputs of 6 MB together.
MAX_BYTES, MAX_ENTRIES, MAX_NAME_BYTES = 256 << 20, 1 << 15, 1 << 10
TOKENS = 1 << 16  # that the moments of an imatrix count as, since `.dat` does not hold their number


@dataclass
class Imatrix(Sensitivity):
    """An imatrix in place of a sensitivity file: the importance of columns, without costs.

    Attributes:
        values: name -> mean square of each column, float32 (K,): names as in the file, and the
            host's without prefix once `match` has assigned them.
        unknown: names in the file that belong to no matrix of the model.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def loss_kind(self) -> str:
        """What its losses are a share of, as in `layer_losses`."""
        return IMATRIX

    def importance(self, name: str) -> torch.Tensor | None:
        """Returns the mean square of each column, float32 (K,); None for a name without values."""
        return self.values.get(name)

    def moments(self, name: str) -> SecondMoments | None:
        """Returns moments whose diagonal is the importance, times a power of two; None without."""
        importance = self.importance(name)
        if importance is None:
            return None
        largest = float(importance.max())
        if not largest:  # tells nothing about the columns
            importance, largest = torch.ones_like(importance), 1.0
        # Only ratios count, and the largest is far from what float32 cannot hold.
        squares = (importance.double() * math.ldexp(TOKENS, -math.frexp(largest)[1])).float()
        moments = SecondMoments.zeros(len(squares), BLOCK)
        moments.count = TOKENS
        padding = moments.blocks.shape[0] * moments.block - len(squares)
        diagonal = torch.nn.functional.pad(squares, (0, padding)).view(-1, moments.block)
        moments.blocks.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        return moments

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> "Imatrix":
        """Returns the imatrix with its names assigned to a model's matrices.

        Args:
            shapes: name -> logical shape of this model, in the host's names without prefix.

        Raises:
            SensitivityError: where it was made with another model.
        """
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        names = sorted(matrices)
        values: dict[str, torch.Tensor] = {}
        unknown, misfits = [], []
        for file_name, importance in self.values.items():
            name = _find_matrix(file_name, names)
            if name is None or name in values:
                unknown.append(file_name)
            elif len(importance) != matrices[name][1]:
                misfits.append((file_name, len(importance), matrices[name]))
            else:
                values[name] = importance
        advice = "Make one with this model, or pick its file."
        if misfits:
            name, columns, shape = misfits[0]
            raise SensitivityError(
                f"{self.file} was made with another model: its {safe_repr(name)} has {columns}"
                f" columns, expected {shape[1]} for the matrix of {shape} here, and"
                f" {len(misfits)} of {len(self.values)} entries do not fit. {advice}")
        if not values:
            name = next(iter(self.values))
            raise SensitivityError(
                f"{self.file} was made with another model: none of its {len(self.values)} names,"
                f" such as {safe_repr(name)}, is a matrix of this one. {advice}")
        used = {name: shapes[name] for name in values}
        return Imatrix({}, used, self.about, self.file, values=values, unknown=unknown)

    def notes(self, packed: list[str], is_for_size: bool) -> list[str]:
        """Returns a sentence on the matrices that it covers, and one on the costs that it lacks.

        Args:
            packed: names of the matrices that are packed.
            is_for_size: whether types are chosen for a size.
        """
        missing = [name for name in packed if name not in self.values]
        text = f"{self.file} covers {len(packed) - len(missing)} of {len(packed)} packed matrices"
        if missing:
            text += f", not {join_some(missing)}"
        if self.unknown:
            names = join_some(map(safe_repr, self.unknown))
            text += f"; of its own names, no matrix has {names}"
        notes = [f"{text}."]
        if is_for_size:
            notes.append(
                f"{self.file} holds no costs of layers, so the types for the size are those chosen"
                " without a measurement.")
        return notes


def load_measurement(path: str | os.PathLike) -> Sensitivity:
    """Reads a sensitivity file or an imatrix, which are told apart by their first bytes.

    Raises:
        SensitivityError, WeightFileError: for another file, or a damaged one.
    """
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError:
        is_gguf = False  # the reader says what is wrong
    if is_gguf or str(path).lower().endswith(SUFFIXES):
        return read_imatrix(path)
    return Sensitivity.load(path)


def read_imatrix(path: str | os.PathLike) -> Imatrix:
    """Reads an imatrix file of either form.

    Raises:
        SensitivityError, WeightFileError: for another file, a damaged or a too large one.
    """
    path = Path(path)
    buffer = map_file(path)
    if len(buffer) > MAX_BYTES:
        raise _error(
            path, f"it takes {size_text(len(buffer), 1)}, more than the {size_text(MAX_BYTES, 1)}"
            " that an imatrix may")
    is_gguf = buffer[:len(MAGIC)] == MAGIC
    values = _read_gguf(path, buffer) if is_gguf else _read_dat(path, buffer[:])
    buffer.guard()
    if not values:
        raise _error(path, "it holds no weight")
    return Imatrix({}, {}, {}, path.name, values=values)


def _error(path: Path, problem: str) -> SensitivityError:
    return SensitivityError(
        f"{path.name} cannot be used as an imatrix: {problem}. Expected one that llama.cpp or"
        " stable-diffusion.cpp wrote; copy it again, make it again, or pick another file.")


def _read_gguf(path: Path, buffer: MappedFile) -> dict[str, torch.Tensor]:
    """Returns name in the file -> importance, float32 (nmat * K,)."""
    counts = struct.unpack_from("<QQ", buffer[8:24].ljust(16, b"\0"))
    if max(counts) > 3 * MAX_ENTRIES:
        raise _error(path, f"it announces {counts[0]} tensors and {counts[1]} entries of metadata,"
                           f" more than {3 * MAX_ENTRIES}")
    header = GGUFHeader(path)
    general_type = header.metadata.get("general.type", "model")
    if general_type != "imatrix":
        raise _error(path, f"its general.type is {safe_repr(general_type)}, not 'imatrix'")
    parts: dict[str, dict[str, torch.Tensor]] = {SUMS: {}, COUNTS: {}}
    remaining = header.size - header.data_start
    for tensor in header.tensors:
        name, part = _split_name(tensor.name)
        if part is None:
            continue
        what, nbytes = safe_repr(tensor.name), 4 * math.prod(tensor.shape)
        if tensor.ggml_type != F32:
            raise _error(path, f"{what} has the ggml type {tensor.ggml_type}, not F32")
        remaining -= nbytes  # overlapping tensors could add up to any size
        start = header.data_start + tensor.offset
        if start + nbytes > header.size or remaining < 0:
            raise _error(path, f"{what} of {nbytes} bytes ends outside of the file")
        if name in parts[part]:
            raise _error(path, f"it holds {what} twice")
        parts[part][name] = _floats(path, what, header.buffer[start:start + nbytes])
    sums, counts = parts[SUMS], parts[COUNTS]
    alone = next(iter(sums.keys() ^ counts.keys()), None)
    if alone is not None:
        lacking = COUNTS if alone in sums else SUMS
        raise _error(path, f"{safe_repr(alone)} has no {lacking[1:]}")
    values = {}
    for name, sum2 in sums.items():
        count = counts[name]
        if not len(count) or not len(sum2) or len(sum2) % len(count):
            raise _error(path, f"{safe_repr(name)} has {len(sum2)} sums for {len(count)} counts")
        count = count.unsqueeze(-1)
        means = torch.where(count > 0, sum2.view(len(count), -1) / count, 1.0).view(-1)
        values[name] = _check(path, safe_repr(name), means)
    return values


def _split_name(name: str) -> tuple[str, str | None]:
    """Returns a weight's name and SUMS or COUNTS, None for another tensor.

    Of a name that ggml has cut, the start of its ending decides.
    """
    for part in (SUMS, COUNTS):
        if name.endswith(part):
            return name.removesuffix(part), part
    stem, _, ending = name.rpartition(".")
    if len(name.encode()) == CUT and stem and ending:
        for part in (SUMS, COUNTS):
            if part.startswith(f".{ending}"):
                return stem, part
    return name, None


def _read_dat(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    """Returns name in the file -> importance, float32 (nmat * K,)."""
    position = 0

    def read_bytes(nbytes: int, what: str) -> bytes:
        nonlocal position
        if nbytes > len(data) - position:
            raise _error(path, f"it ends at byte {len(data)}, inside {what}")
        position += nbytes
        return data[position - nbytes:position]

    def read_number(what: str, least: int, most: int) -> int:
        value = struct.unpack("<i", read_bytes(4, what))[0]
        if not least <= value <= most:
            raise _error(path, f"{what} is {value}, expected {least} to {most}")
        return value

    def read_text(what: str, least: int = 0) -> str:
        length = read_number(f"the length of {what}", least, MAX_NAME_BYTES)
        try:
            return read_bytes(length, what).decode()
        except UnicodeDecodeError:
            raise _error(path, f"{what} is not UTF-8 text") from None

    values = {}
    for index in range(read_number("the number of its entries", 1, MAX_ENTRIES)):
        name = read_text(f"the name of entry {index}", 1)
        what = safe_repr(name)
        if name in values:
            raise _error(path, f"it holds {what} twice")
        calls = read_number(f"the number of calls of {what}", 0, (1 << 31) - 1)
        count = read_number(f"the number of values of {what}", 1, len(data) // 4)
        sums = _floats(path, what, read_bytes(4 * count, f"the values of {what}"))
        importance = sums / float(calls) if calls else sums
        values[name] = _check(path, what, importance)
    if position < len(data):
        read_number("the number of its last chunk", -(1 << 31), (1 << 31) - 1)
        if position < len(data):
            read_text("the name of its dataset")
        if position < len(data):
            raise _error(path, f"{len(data) - position} bytes follow its end")
    return values


def _floats(path: Path, what: str, data: bytes) -> torch.Tensor:
    values = (torch.frombuffer(bytearray(data), dtype=torch.float32) if data
              else torch.empty(0, dtype=torch.float32))
    return _check(path, what, values)


def _check(path: Path, what: str, values: torch.Tensor) -> torch.Tensor:
    if len(values) and not (values.isfinite().all() and values.min() >= 0):
        raise _error(path, f"{what} holds negative, NaN or infinite values")
    return values


def _find_matrix(name: str, matrices: list[str]) -> str | None:
    """Returns the matrix that a name in a file means, None for no or several ones.

    Args:
        name: as in the file, with a prefix or without, cut after CUT bytes or whole.
        matrices: the host's names without prefix, sorted.
    """
    names = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    for whole in names:
        index = bisect_left(matrices, whole)
        if matrices[index:index + 1] == [whole]:
            return whole
    for start in names if len(name.encode()) == CUT else ():
        index = bisect_left(matrices, start)
        matches = [other for other in matrices[index:index + 2] if other.startswith(start)]
        if len(matches) == 1:
            return matches[0]
    return None
