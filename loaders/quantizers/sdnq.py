"""Reads weights that SDNQ quantised: several tensors in the file, one packed tensor in memory.

| in the file (layer `L`, weight (N, K)) | shape | dtype |
|---|---|---|
| `L.weight`, codes of 8 bits | (N, K), (N, groups, group), (N, C, *kernel) | int8, uint8, float8 |
| codes of 1, 2 or 4 bits | flat | uint8; of 1 bit also int64 |
| codes of 3, 5, 6 or 7 bits | (packs, bytes of a pack) | uint8 |
| `L.scale`, `L.zero_point` | (N, 1) or (N, groups, 1), then *kernel | float, or codes |
| `L.scale_2`, `L.zero_point_scale` | (1,) or (256,), by which codes are read | float32 |
| `L.scale_zero_point`, `L.zero_point_2` | (1,), added to them | float32 |
| `L.svd_up`, `L.svd_down` | (N, R), (R, K), added to the weight | float |

Codebooks have 2**bits levels, before the kernel, in place of a group's scale. The types of the
codes and the rotation are only in the config (`quantization_config`). With `use_quantized_matmul`
codes of 8 bits that have one scale a row, and the factors, are transposed. A file without a config
is read as integers that are not rotated, SDNQ's default, with the bits that its sizes leave; see
`_Layer.choose_bits_by_sizes`.

The layouts are those that sdnq 0.1.0 to 0.2.8 write.
"""
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ...ops.formats.low_rank_and_joined import FACTOR_DTYPES
from ...ops.formats.row_layout import PACK_CODES, RowFamily
from ...ops.formats.sdnq import ALIASES, CODEBOOKS, NUMBER_TYPES, ROTATION_BASE, SDNQ_TYPES
from ...ops.log import log
from ...ops.tensor.packed_layout import packed_rows, with_low_rank
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import (
    CONFIG_KEY,
    DOWNLOAD_AGAIN,
    WeightFile,
    describe,
    map_file,
    safe_repr,
)
from .base import HeaderOf, Layer, Quantizer, Read, scaled_layers
from .comfy_quant_formats import MAX_ROTATION
from .comfy_quant_marks import MARK
from .parts import FLOATS, Part, PartError

METHOD = "sdnq"  # `quant_method` of a config
MAX_PATTERNS = 4096  # of a config; each is tried for each layer
CONFIG_FILES = ("config.json", "quantization_config.json")
SCALE, ZERO, UP, DOWN = "scale", "zero_point", "svd_up", "svd_down"
# names of a number's factor, or table, and of what is added
SCALE_PARTS, ZERO_PARTS = ("scale_2", "scale_zero_point"), ("zero_point_scale", "zero_point_2")
BYTE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
FOUND = (*BYTE_DTYPES, torch.int64, torch.int16, torch.uint16)  # dtypes of codes that writers have
_FACTOR = Part("(A, B)", tuple(FACTOR_DTYPES.values()), "low rank")
_NUMBERS = Part("", (*FLOATS, torch.uint8, torch.int8))  # floats, or codes of them
PARTS = {
    "weight": Part("", (*BYTE_DTYPES, torch.int64)), SCALE: _NUMBERS,
    ZERO: replace(_NUMBERS, optional=ZERO),
    SCALE_PARTS[0]: Part("1 or 256", FLOATS, SCALE_PARTS[0]),
    SCALE_PARTS[1]: Part("1", FLOATS, SCALE_PARTS[1]),
    ZERO_PARTS[0]: Part("1 or 256", FLOATS, ZERO_PARTS[0]),
    ZERO_PARTS[1]: Part("1", FLOATS, ZERO_PARTS[1]),
    UP: _FACTOR, DOWN: replace(_FACTOR, shape="(C, D)"),
}
LEFTOVERS = re.compile(rf"\.({'|'.join(name for name in PARTS if name not in ('weight', SCALE))})$")
# versions of SDNQ from which powers of four are rotated by powers of H4, and from which small
# floats have subnormals
H4_VERSION, SUBNORMALS_VERSION = (0, 2, 0), (0, 2, 2)
ROTATION, EARLIER_ROTATION = 256, 128  # values, where the config names no number
SMALLEST_ROTATION = 4
CONFIG = "Put the config.json of the model next to it, or load the model's folder."


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with codes and scales."""
    for layer in scaled_layers(names, (SCALE,)):
        if header_of(f"{layer}.weight").dtype in FOUND:
            yield layer


def read_config(path: Path) -> Mapping[str, Any] | None:
    """Returns the SDNQ config in the folder of a weight file, None where there is none."""
    for name in CONFIG_FILES:
        try:
            content = read_json(bytes(map_file(path.parent / name)))
        except ValueError:  # also a WeightFileError
            continue
        config = extract_config(content)
        if config is not None:
            return config
    return None


def extract_config(content: Any) -> Mapping[str, Any] | None:
    """Returns the SDNQ config in the content of a JSON file or of metadata, None without one."""
    if isinstance(content, dict) and isinstance(content.get(CONFIG_KEY), dict):
        content = content[CONFIG_KEY]
    is_config = isinstance(content, dict) and content.get("quant_method") == METHOD
    return content if is_config else None


def _config_of(file: WeightFile) -> Mapping[str, Any] | None:
    """Returns SDNQ's config of a file, or beside it; None without one."""
    config = extract_config(file.quantization)
    return config if config or file.path.is_dir() else read_config(file.path)


def _has_neighbours(file: WeightFile) -> bool:
    """Returns whether other files of weights are in the folder of a file."""
    with suppress(OSError):
        others = {path for path in file.path.parent.iterdir()
                  if path.suffix.lower() in (".safetensors", ".sft")}
        return bool(others.difference(file.paths))
    return False


@contextmanager
def session(file: WeightFile, tensors: Mapping[str, torch.Tensor]) -> Iterator[Read]:
    """Gives what reads a layer with the config of its file, and refuses what is left of others."""
    config = _config_of(file)
    if config is None:
        log.info("%s has no config of SDNQ: read as integers, not rotated.",
                 file.path.name)
    elif not extract_config(file.quantization) and _has_neighbours(file):
        file.note(f"{file.path.name} is read by the config of SDNQ beside it, as the other models"
                  " of its folder are. If images are noise, give it a folder of its own.")

    def read(layer: Layer) -> PackedTensor:
        settings = None if config is None else read_settings(config, f"{layer.name}.weight")
        return _Layer(layer, tensors.get(f"{layer.name}.bias"), settings).join()

    yield read
    for name, tensor in tensors.items():
        if LEFTOVERS.search(name):
            raise file.error_at(
                name, f"{safe_repr(name)} is part of an SDNQ weight whose other parts are not in"
                " the file", DOWNLOAD_AGAIN)
        layer = name.removesuffix(".weight")
        if (layer != name and tensor.dtype in (torch.uint8, torch.int8)
                and f"{layer}{MARK}" not in tensors):
            raise file.error_at(
                name, f"{safe_repr(name)} has codes of SDNQ, but {safe_repr(f'{layer}.{SCALE}')},"
                " their scales, is not in the file", DOWNLOAD_AGAIN)


@dataclass(frozen=True)
class LayerSettings:
    """What a config says about a layer.

    Attributes:
        type_name: of its codes, a key of `SDNQ_TYPES`.
        has_codebook: whether the codes select levels.
        rotation: largest number of values that are rotated together, 0 for none.
        version: of SDNQ, None where the config does not say.
        is_transposed: whether the weight was written for a product of quantised numbers.
    """

    type_name: str
    has_codebook: bool
    rotation: int
    version: tuple[int, ...] | None
    is_transposed: bool


def read_settings(config: Mapping[str, Any], name: str) -> LayerSettings:
    """Returns the settings of a weight.

    Args:
        config: of SDNQ.
        name: of the weight.

    Raises:
        PartError: they are not those of a weight that can be read.
    """
    if _count_patterns(config) > MAX_PATTERNS:
        raise PartError(f"its config has more than {MAX_PATTERNS} patterns of layers")
    settings = dict(config)
    own = _find_entry(config.get("modules_quant_config"),
                 lambda pattern, _: matches(pattern, name))
    if own is not None and isinstance(own[1], dict):
        settings |= own[1]
    type_name = settings.get("weights_dtype", "int8")
    entry = _find_entry(config.get("modules_dtype_dict"), lambda _, patterns: isinstance(
        patterns, list) and any(matches(pattern, name) for pattern in patterns))
    if entry is not None:
        type_name = _listed_type(entry[0], type_name)
    type_name = ALIASES.get(type_name, type_name) if isinstance(type_name, str) else type_name
    if not isinstance(type_name, str) or type_name not in SDNQ_TYPES:
        raise PartError(
            f"its codes are of the type {safe_repr(type_name)}; expected one of at most 8 bits,"
            " such as uint4 or int8", "Update this pack, or get another conversion.")
    version = _version(settings.get("sdnq_version"))
    rotation = 0
    if settings.get("use_hadamard"):
        default = EARLIER_ROTATION if version and version < H4_VERSION else ROTATION
        rotation = settings.get("hadamard_group_size", default)
        if type(rotation) is not int or rotation < 1 or rotation & rotation - 1:
            raise PartError(f"it is rotated in groups of {safe_repr(rotation)} values; expected a"
                            " power of two")
    return LayerSettings(type_name, bool(settings.get("use_codebook")), rotation, version,
                         bool(settings.get("use_quantized_matmul")))


def _count_patterns(config: Mapping[str, Any]) -> int:
    own, listed = config.get("modules_quant_config"), config.get("modules_dtype_dict")
    lists = listed.values() if isinstance(listed, dict) else ()
    return (len(own) if isinstance(own, dict) else 0) + sum(
        1 + (len(patterns) if isinstance(patterns, list) else 0) for patterns in lists)


def _find_entry(entries: Any, accepts: Callable[[str, Any], bool]) -> tuple[str, Any] | None:
    """Returns the first accepted (key, value) of a config's dict, None without one."""
    entries = entries if isinstance(entries, dict) else {}
    return next(((key, value) for key, value in entries.items() if accepts(key, value)), None)


def _listed_type(key: str, type_name: Any) -> Any:
    """Returns the type that a key of `modules_dtype_dict` stands for, such as "minimum_6bit".

    Args:
        key: a type, or the least number of bits.
        type_name: that the layer has otherwise.
    """
    match = re.fullmatch(r"minimum_(\d{1,2})\w*", key)
    if match is None:
        return key
    bits = re.search(r"\d+", str(type_name))
    return f"int{match[1]}" if bits is None or int(bits[0]) < int(match[1]) else type_name


def _version(text: Any) -> tuple[int, ...] | None:
    match = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", text) if isinstance(text, str) else None
    return tuple(map(int, match.groups())) if match else None


def matches(pattern: Any, name: str) -> bool:
    """Returns whether a pattern of a config is that of a weight.

    A pattern is the name, one of the words between its dots, a dot and the beginning of the name,
    or a beginning in which `*` stands for any text.

    Args:
        pattern: of a config.
        name: of a weight.
    """
    if not isinstance(pattern, str) or not pattern:
        return False
    if pattern == name or pattern in name.split("."):
        return True
    if pattern.startswith(".") and name.startswith(pattern[1:]):
        return True
    first, *rest = pattern.split("*")
    if not rest or not name.startswith(first):
        return False
    position = len(first)
    for text in rest:
        position = name.find(text, position)
        if position < 0:
            return False
        position += len(text)
    return True


class _Layer:
    """The tensors of one weight.

    Attributes:
        settings: of the config, None without one.
        weight, scale, zero: as stored, later in the order of the rows.
        has_codebook: whether the codes select levels.
        bits: of a code.
        rows, columns: of the weight, whose other dimensions are flattened.
        groups: of the input channels of a row.
        kernel: dimensions of a convolution's kernel.
    """

    def __init__(self, layer: Layer, bias: torch.Tensor | None, settings: LayerSettings | None):
        self.settings, parts = settings, layer.parts
        self.is_transposed = settings is not None and settings.is_transposed
        self.bias_length = len(bias) if bias is not None and bias.ndim == 1 else None
        self.weight, self.scale, self.zero = parts["weight"], parts[SCALE], parts.get(ZERO)
        self.scale_parts = [parts.get(part) for part in SCALE_PARTS]
        self.zero_parts = [parts.get(part) for part in ZERO_PARTS]
        self.up, self.down = parts.get(UP), parts.get(DOWN)

    def join(self) -> PackedTensor:
        """Returns the packed weight. Raises PartError and FormatError."""
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise PartError(f"its zero_point is {describe(self.zero)} and its scale"
                            f" {describe(self.scale)}; expected the same shape")
        self.order_rows()
        self.has_codebook = self.settings.has_codebook if self.settings else (
            self.zero is None and self.scale.ndim == 2 and self.scale.shape[1] > 1)
        stored = _stored_bits(self.weight)
        self.rows = self.count_rows()
        by_config, by_sizes = self.choose_bits_by_config, self.choose_bits_by_sizes
        self.bits = (by_config if self.settings else by_sizes)(stored)
        self.groups, self.kernel = self.read_scale_layout(self.bits)
        self.columns = self.count_columns(self.bits)
        channels = self.count_channels(self.bits, self.columns)
        family = self.choose_family()
        if channels is None:
            raise PartError(f"its weight is {describe(self.weight)} and its scale"
                            f" {describe(self.scale)}, which make no {family.example.title} weight"
                            f" of {self.rows} rows")
        if self.columns % PACK_CODES[self.bits]:
            raise PartError(
                f"its rows have {self.columns} codes of {self.bits} bits, of which"
                f" {PACK_CODES[self.bits]} are packed together across the ends of rows; expected"
                " a multiple of them in a row",
                "Get a conversion that does not pack this layer, or has it in 8 bits.")
        group = channels // self.groups if self.groups > 1 else 0
        taps = math.prod(self.kernel) if self.scale.numel() > 1 else 1
        scale = self.expand_to_rows(self.scale)
        scale_type, tensors = _read_numbers(scale, "scale", "scale", *self.scale_parts)
        zero_type = 0
        if self.zero is not None:
            zero = self.expand_to_rows(self.zero)
            zero_type, zeros = _read_numbers(zero, "zero_point", "minimum", *self.zero_parts)
            tensors |= zeros
        sizes = [group, taps, *self.choose_rotation(channels), scale_type, zero_type]
        if family.example.codes.numbers:
            has_subnormals = self.is_from_version(SUBNORMALS_VERSION, "its codes are small floats")
            sizes.append(int(has_subnormals))
        shape = (self.rows, self.columns)
        if self.kernel:
            shape = (self.rows, channels, *self.kernel)
        weight = packed_rows(family, _as_bytes(self.weight), shape, sizes, **tensors)
        return weight if self.up is None else with_low_rank(weight, *self.read_factors())

    def order_rows(self):
        """Brings transposed tensors into the order of the rows."""
        if self.weight.ndim != 2 or self.scale.ndim != 2 or _stored_bits(self.weight) != {8}:
            return
        rows, columns = self.weight.shape
        is_row = self.scale.shape[0] == 1 and self.scale.shape[1] == columns and rows > 1
        is_single = self.scale.numel() == 1 and self.is_transposed
        if is_single or (is_row and columns > 1):
            self.weight, self.scale = self.weight.t(), self.scale.t()
            self.zero = None if self.zero is None else self.zero.t()

    def count_rows(self) -> int:
        """Returns the rows of the weight."""
        if self.scale.ndim < 2:
            raise PartError(f"its scale is {describe(self.scale)}; expected (rows, 1) or"
                            " (rows, groups, 1)", "Get a conversion with scales in float.")
        if len(self.scale) != 1:
            return len(self.scale)
        if _stored_bits(self.weight) == {8} and self.weight.ndim > 1:
            return len(self.weight)
        rows = self.bias_length
        if rows is None and self.up is not None and self.up.ndim == 2:
            rows = self.up.shape[1 if self.is_transposed else 0]
        if self.scale.numel() > 1 and rows not in (None, 1):
            raise PartError(f"its scale is {describe(self.scale)}, of a transposed convolution;"
                            " expected one of a linear layer, a convolution or an embedding",
                            "Get a conversion that does not pack this layer.")
        if rows is None:
            raise PartError("it has one scale for all rows, which do not say how many they are;"
                            " expected a bias or svd_up next to it",
                            "Get a conversion with scales of rows or groups.")
        return rows

    def choose_bits_by_config(self, stored: set[int]) -> int:
        """Returns the bits of a code by the config.

        Args:
            stored: possible numbers by the shape of the codes.
        """
        assert self.settings is not None
        bits = SDNQ_TYPES[self.settings.type_name].example.codes.bits
        if bits not in stored:
            raise PartError(
                f"its codes are {describe(self.weight)}; expected those of"
                f" {self.settings.type_name}, which the config names",
                "Download the config.json and the weights again, from one place.")
        return bits

    def choose_bits_by_sizes(self, stored: set[int]) -> int:
        """Returns the bits of a code of a file without a config.

        The shape of the codes leaves one number, or two. Of these the columns of `svd_down`, the
        levels of a codebook or the default length of a group tell the right one.

        Args:
            stored: possible numbers by the shape of the codes.
        """
        columns = {}  # bits -> columns, where the scales make whole rows of them
        for bits in stored:
            try:
                self.groups, self.kernel = self.read_scale_layout(bits)
            except PartError:
                continue
            if self.count_channels(bits, count := self.count_columns(bits)) is not None:
                columns[bits] = count
        candidates = [bits for bits, count in columns.items()
                      if len(columns) == 1 or self.reads_scales_as(bits, count)]
        if len(candidates) != 1:
            sizes = " or ".join(map(str, sorted(stored)))
            raise PartError(
                f"its codes, {describe(self.weight)}, may have {sizes} bits, and its"
                f" other tensors do not tell which; expected a config that says so", CONFIG)
        return candidates[0]

    def reads_scales_as(self, bits: int, columns: int) -> bool:
        """Returns whether something besides the number of codes speaks for their bits."""
        self.groups, self.kernel = self.read_scale_layout(bits)
        if self.has_codebook:
            return True  # the levels are as many
        if self.down is not None and self.down.ndim == 2:
            return columns in self.down.shape
        group = columns // math.prod(self.kernel) // self.groups
        return self.groups > 1 and group == 2**(bits + (1 if self.kernel else 2))

    def read_scale_layout(self, bits: int) -> tuple[int, tuple[int, ...]]:
        """Returns the groups of a row and the kernel by the shape of the scales."""
        shape: list[int] = list(self.scale.shape)[1:]
        if self.scale.numel() == 1:
            return 1, tuple(self.weight.shape[2:]) if bits == 8 else ()
        levels = 2**bits if self.has_codebook else 1
        if levels > 1 and len(shape) > 1 and shape[1] == levels:
            return shape[0], tuple(shape[2:])
        if shape[0] == levels:
            return 1, tuple(shape[1:])
        if len(shape) > 1 and shape[1] == levels:
            return shape[0], tuple(shape[2:])
        expected = f"{levels} levels" if self.has_codebook else "scales"
        raise PartError(f"its scale is {describe(self.scale)}; expected {expected} of rows, of"
                        " groups or of a kernel")

    def count_columns(self, bits: int) -> int:
        """Returns the columns of the weight, 0 where its codes do not make whole rows."""
        codes = self.weight.numel() * 8 // bits
        is_whole = self.rows and self.weight.numel() * 8 % bits == codes % self.rows == 0
        return codes // self.rows if is_whole else 0

    def count_channels(self, bits: int, columns: int) -> int | None:
        """Returns the input channels of rows of some columns, None where these do not divide."""
        taps = math.prod(self.kernel)
        if not columns or not taps or not self.groups or columns % (taps * self.groups):
            return None
        shape = self.weight.shape
        if bits == 8 and (
                shape[0] != self.rows or len(shape) - len(self.kernel) not in (2, 3)):
            return None
        return columns // taps

    def choose_family(self) -> RowFamily:
        """Returns the family of formats for the codes."""
        if self.has_codebook:
            if self.zero is not None:
                raise PartError("it has both a codebook and a zero_point")
            return CODEBOOKS[self.bits]
        if self.settings is not None:
            family = SDNQ_TYPES[self.settings.type_name]
        elif self.weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            family = SDNQ_TYPES[str(self.weight.dtype).removeprefix("torch.")]
        else:
            family = SDNQ_TYPES.get(f"{'int' if self.zero is None else 'uint'}{self.bits}",
                                    SDNQ_TYPES["uint1"])
        has_zeros = family.example.minimum is not None
        expected = "a zero_point" if has_zeros else "no zero_point"
        if has_zeros != (self.zero is not None):
            raise PartError(f"it has {'a' if self.zero is not None else 'no'} zero_point; expected"
                            f" {expected} with codes of {family.example.title}")
        dtype = family.example.codes.dtype
        if self.bits == 8 and self.weight.dtype != dtype:
            raise PartError(f"its codes are {describe(self.weight)}; expected"
                            f" {str(dtype).removeprefix('torch.')} for {family.example.title}")
        return family

    def choose_rotation(self, channels: int) -> tuple[int, int]:
        """Returns how many values are rotated together, and the base of the rotation."""
        size = self.settings.rotation if self.settings else 0
        while size and channels % size:
            size //= 2
        if size > MAX_ROTATION:
            raise PartError(f"it is rotated in groups of {size} values; expected at most"
                            f" {MAX_ROTATION}")
        if size < SMALLEST_ROTATION:
            return 0, ROTATION_BASE
        if size.bit_length() % 2 == 0:  # only powers of four have two rotations
            return size, 2
        return size, 4 if self.is_from_version(H4_VERSION, "it is rotated") else 2

    def is_from_version(self, version: tuple[int, ...], reason: str) -> bool:
        """Returns whether a version of SDNQ or a later one wrote the weight.

        Args:
            version: of SDNQ.
            reason: why it matters, for a message.
        """
        writer = None if self.settings is None else self.settings.version
        if writer is None:
            raise PartError(f"{reason}, and the config does not say by which version of SDNQ;"
                            " expected sdnq_version in it", CONFIG)
        return writer >= version

    def read_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the factors of the low rank, (rows, R) and (R, columns)."""
        assert self.up is not None and self.down is not None
        up, down, expected = self.up, self.down, (self.rows, self.columns)
        is_plain = (len(up), down.shape[1]) == expected and up.shape[1] == len(down)
        is_turned = (up.shape[1], len(down)) == expected and len(up) == down.shape[1]
        if is_turned and (self.is_transposed or not is_plain):
            return up.t(), down.t()
        if is_plain:
            return up, down
        raise PartError(f"its svd_up is {describe(up)} and its svd_down {describe(down)};"
                        f" expected factors of a weight of {expected}")

    def expand_to_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns one number for each row where a file has one for the whole weight."""
        return numbers.flatten().expand(self.rows) if numbers.numel() == 1 else numbers


def _stored_bits(weight: torch.Tensor) -> set[int]:
    """Returns the numbers of bits that codes of this shape and dtype may have."""
    if weight.dtype == torch.int64:
        return {1} if weight.ndim == 1 else set()
    if weight.dtype != torch.uint8:
        return {8}
    if weight.ndim == 1:
        return {1, 2, 4}
    packs = {3: {3, 6}, 5: {5}, 7: {7}}.get(weight.shape[-1], set()) if weight.ndim == 2 else set()
    return packs | {8}


def _as_bytes(weight: torch.Tensor) -> torch.Tensor:
    """Returns codes as uint8, flat, in the order of the rows."""
    if weight.dtype == torch.int64:
        if weight.numel() and not 0 <= weight.min() <= weight.max() < 256:
            raise PartError("its codes of 1 bit are not bytes")
        return weight.to(torch.uint8)
    return weight.contiguous().view(-1).view(torch.uint8)


def _read_numbers(stored: torch.Tensor, part: str, name: str, factor: torch.Tensor | None,
                  offset: torch.Tensor | None) -> tuple[int, dict[str, torch.Tensor]]:
    """Returns scales or zero points as a format holds them: a place in `NUMBER_TYPES`, the tensors.

    Args:
        stored: as in the file.
        part: their name in the file, for messages.
        name: in the layout.
        factor: float (1,) by which they are multiplied, (256,) from which they are looked up, or
            None.
        offset: float (1,) that is added to them, or None.
    """
    count = 1 if factor is None else factor.numel()
    is_table = stored.dtype == torch.uint8 and count == 256 and offset is None
    if not (count == 1 or is_table) or (factor is None and stored.dtype in BYTE_DTYPES):
        raise PartError(f"its {part} is {describe(stored)} without the numbers that it is read"
                        " by; expected floats, or codes with scale_2 or zero_point_scale")
    factor = torch.ones(1, dtype=torch.float32) if factor is None else factor.float().view(-1)
    if stored.dtype in BYTE_DTYPES:
        table = factor
        if not is_table:
            table = torch.arange(256).to(torch.uint8).view(stored.dtype).float() * factor
            table = table if offset is None else table + offset.float()
        return list(NUMBER_TYPES).index(torch.uint8), {
            name: stored, f"{name}_table": table}
    if stored.dtype in (torch.bfloat16, torch.float16) and offset is None:
        return list(NUMBER_TYPES).index(stored.dtype), {name: stored, f"{name}_factor": factor}
    numbers = stored.contiguous().view(-1).float()
    if count == 1 and factor.item() != 1:
        numbers = numbers * factor
    return 0, {name: numbers if offset is None else numbers + offset.float()}


QUANTIZER = Quantizer(name="SDNQ", methods={METHOD: "SDNQ"}, find=find, layouts={"SDNQ": PARTS},
                      session=session)
