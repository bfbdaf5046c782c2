"""safetensors files (https://github.com/huggingface/safetensors#format), with what quantisers keep in them.

| part | content |
|---|---|
| header length | u64, little endian |
| header | JSON: name -> `dtype`, `shape`, `data_offsets` [start, end); `__metadata__`: string -> string |
| data | offsets count from its start |

A quantiser keeps several tensors for one weight. `state_dict` puts those of bitsandbytes together, per key, so that a
host that knows the dense model finds weights of the shapes it expects:

| in the file (weight `X` of [N, K]) | in the state dict |
|---|---|
| `X` codes, `X.absmax`, `X.quant_map`, `X.quant_state.bitsandbytes__nf4` or `__fp4`, perhaps `X.nested_*` | `X` packed |
| `L.weight` int8, `L.SCB` or `L.weight.SCB` float32 [N], `L.weight_format` | `L.weight` packed |
"""
import json
import math
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ..ops.format import FORMATS
from ..ops.formats.bnb_int8 import INT8
from ..ops.tensor import packed_tensor
from .container import PLAIN_DTYPES, Each, Entry, WeightFile, WeightFileError, map_file, shown

MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no more either
MAX_ELEMENTS = (1 << 60) - 1  # of a tensor whose bytes torch can count

QUANT_TYPES = {"nf4": FORMATS["NF4"], "fp4": FORMATS["FP4"]}
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)  # bitsandbytes' `quant_storage`
BLOCK_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes 0.50 `functional.quantize_4bit`

QUANT_STATE = re.compile(r"(?P<weight>.+)(?<!absmax)(?<!quant_map)(?<!SCB)\.quant_state\.bitsandbytes__(?P<quant_type>\w+)")
SCALES_OF_INT8 = re.compile(r"(?P<layer>.+?)(\.weight)?\.SCB")
SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.safetensors)", re.IGNORECASE)

# What is left of a quantiser that nothing here puts together: keys, whose they are, and what to do.
OTHER_FORM = "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types."
LEFTOVERS = (
    (r"\.(nested_)?absmax$|\.(nested_)?quant_map$|\.quant_state(\..*)?$", "part of a bitsandbytes 4-bit weight whose other"
     " parts are not in the file", "Download it again, or get another conversion."),
    (r"\.SCB$|\.weight_format$", "part of a bitsandbytes int8 weight whose other parts are not in the file",
     "Download it again, or get another conversion."),
    (r"\.(wscales|smooth_factor|smooth_factor_orig)$", "part of a weight quantised by nunchaku (SVDQuant)",
     f"Use nunchaku's own nodes for it. {OTHER_FORM}"),
    (r"\.(qweight|qzeros|g_idx)$", "part of a weight quantised by GPTQ or AWQ, which are not supported", OTHER_FORM),
    (r"\._weight_(qdata|scale|zero_point)$", "part of a weight quantised by torchao, which is not supported", OTHER_FORM),
    (r"\.weight\._(data|scale|shift|packed)$", "part of a weight quantised by quanto, which is not supported", OTHER_FORM),
    (r"\.W_q$", "part of a weight quantised by HQQ, which is not supported", OTHER_FORM),
)


class SafetensorsFile(WeightFile):
    """The weights of one safetensors file, or of one split in several (`name-00001-of-00003.safetensors`, opened by any).

    entries: the tensors as they lie in the files, before `state_dict` puts together what belongs together.
    Raises WeightFileError.
    """

    magic = b"{"
    dtypes = PLAIN_DTYPES | {
        "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    } | ({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {})  # torch 2.7

    def __init__(self, path: str | Path, paths: Sequence[Path] | None = None):
        """path: as asked for, named in errors. paths: the files to read, where they are not to be told from `path`."""
        path = Path(path)
        paths = _shards(path) if paths is None else paths
        buffers, metadata, entries = [], [], {}
        for part, name in enumerate(paths):
            buffers.append(map_file(name))
            found, texts = _read_header(name, buffers[-1], part, self.dtypes)
            twice = next((key for key in found if key in entries), None)
            if twice is not None:
                raise WeightFileError(f"{name.name}: {shown(twice)} is in {paths[entries[twice].part].name} too. Download "
                                      f"all files of the model again from one place.")
            entries |= found
            metadata.append(texts)
        super().__init__(path, paths, buffers, ChainMap(*metadata), entries)

    @classmethod
    def recognises(cls, head: bytes) -> bool:
        return head[8:9] == cls.magic and int.from_bytes(head[:8], "little") < 1 << 32

    def alignment(self, dtype):
        # Tensors lie without gaps, ordered by the size of their elements: one quant_state of an odd length, and no 4-bit
        # weight behind it is at a multiple of 8. Copying them would take the memory of the model.
        return dtype.itemsize

    def state_dict(self, each: Each = iter) -> dict[str, torch.Tensor]:
        """Name -> tensor, not copied, with bitsandbytes' weights put together; see the table at the top of the module.

        Everything else is as it is in the file, quantised layers in the host's own form too. Packed tensors show
        float32. Scales that are quantised themselves are expanded to float32, which takes most of the time.
        """
        return _Collapse(self, super().state_dict()).run(each)


def _shards(path: Path) -> list[Path]:
    """All files of the model that `path` is one file of."""
    names = SHARD.fullmatch(path.name)
    if names is None or not 1 <= int(names[3]) <= 1000 or int(names[2]) > int(names[3]):
        return [path]
    paths = [path.with_name(f"{names[1]}{number:05d}-of-{names[3]}{names[4]}") for number in range(1, int(names[3]) + 1)]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing and path.name not in missing:
        raise WeightFileError(
            f"{path.name} is one file of a model split into {len(paths)}; {missing[0]} is missing beside it"
            f"{f' and {len(missing) - 1} more are' if missing[1:] else ''}. Download all {len(paths)} into one folder.")
    return [path] if missing else paths


def _read_header(path: Path, buffer, part: int, dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one file in the order of their data, and its metadata, all checked against the file's size."""

    def damaged(problem: str) -> WeightFileError:
        return WeightFileError(f"{path.name}: {problem}. The file is damaged or its download incomplete; download it again.")

    size = len(buffer)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if size < 8 or start > size or start > MAX_HEADER_BYTES:
        raise damaged(f"the header should end at byte {start}, the file ends at byte {size}")
    try:
        header = json.loads(buffer[8:start].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(f"the header is not readable ({shown(str(error))})") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(header, dict) or not isinstance(metadata, dict):
        raise damaged("the header is not a JSON object of tensors")

    if not header:
        raise damaged("it is a safetensors file without a tensor")
    entries = []
    for name, info in header.items():
        try:
            dtype, shape, (first, last) = info["dtype"], info["shape"], info["data_offsets"]
            numbers = all(type(number) is int and 0 <= number <= MAX_ELEMENTS for number in [*shape, first, last])
            numbers = numbers and math.prod(max(size, 1) for size in shape) <= MAX_ELEMENTS
        except (TypeError, KeyError, ValueError):
            numbers = False
        if not numbers:
            raise damaged(f"the description of {shown(name)} is {shown(info)}, not a dtype, shape and two data_offsets")
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise WeightFileError(f"{path.name}: {shown(name)} has the type {shown(dtype)}, which cannot be read. Supported "
                                  f"are {', '.join(dtypes)}. Get another conversion, or update this pack.")
        nbytes = math.prod(shape) * dtypes[dtype].itemsize
        if last - first != nbytes:
            raise damaged(f"{shown(name)} of type {dtype} and shape {shape} takes {nbytes} bytes, {last - first} are given")
        if start + last > size:
            raise damaged(f"{shown(name)} should end at byte {start + last}, the file ends at byte {size}")
        entries.append(Entry(name, tuple(shape), tuple(shape), dtype, start + first, nbytes, part))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    for before, after in pairwise(entries):
        if before.offset + before.nbytes > after.offset:
            raise damaged(f"the tensors {shown(before.name)} and {shown(after.name)} overlap")
    return {entry.name: entry for entry in entries}, {key: str(value) for key, value in metadata.items()}


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


class _Collapse:
    """One pass over the tensors of a file that puts those of one weight together."""

    def __init__(self, file: SafetensorsFile, tensors: dict[str, torch.Tensor]):
        self.file = file
        self.entries = file.entries
        self.tensors = tensors

    def error(self, key: str, problem: str,
              advice: str = "Download the file again, or get another conversion.") -> WeightFileError:
        """key: a tensor of the file in question."""
        path = self.file.paths[self.entries[key].part] if key in self.entries else self.file.path
        return WeightFileError(f"{path.name}: {problem}. {advice}")

    def run(self, each: Each) -> dict[str, torch.Tensor]:
        for key in each(list(self.entries)):
            if found := QUANT_STATE.fullmatch(key):
                weight = found["weight"]
                self.tensors[weight] = self.packed(key, weight, found["quant_type"])
            elif found := SCALES_OF_INT8.fullmatch(key):
                self.int8_weight(key, found["layer"])
        self.refuse_leftovers()
        return self.tensors

    def part(self, key: str, weight: str, what: str) -> torch.Tensor:
        """Takes one part of a weight out of the tensors."""
        if key not in self.tensors:
            raise self.error(weight, f"{shown(key)} is missing, the {what} of {shown(weight)}")
        return self.tensors.pop(key)

    def packed(self, key: str, weight: str, quant_type: str) -> torch.Tensor:
        """The packed tensor of a 4-bit weight; its parts are taken out of the tensors."""
        if quant_type not in QUANT_TYPES:
            known = " and ".join(QUANT_TYPES)
            raise self.error(key, f"{shown(key)} names the quant_type {shown(quant_type)}; {known} are supported", OTHER_FORM)
        if any(f"{weight}.quant_state.bitsandbytes__{other}" in self.tensors for other in QUANT_TYPES if other != quant_type):
            raise self.error(key, f"{shown(weight)} has two quant_states")
        state = self.quant_state(key, quant_type)
        packed_format = QUANT_TYPES[quant_type].of_block_length(state["blocksize"])
        shape = tuple(state["shape"])
        values = math.prod(shape)
        if weight not in self.tensors:
            raise self.error(key, f"{shown(weight)} is missing, whose {shown(key)} is there")
        stored = self.tensors[weight]
        if stored.dtype not in STORAGE_DTYPES:
            raise self.error(key, f"{shown(weight)} has the type {self.entries[weight].format}, not one that bitsandbytes keeps"
                                  f" 4-bit codes in")
        codes = stored.contiguous().view(-1).view(torch.uint8)
        needed = -(-values // 2)
        if not needed <= len(codes) < needed + stored.dtype.itemsize:
            raise self.error(key, f"{shown(key)} gives {shown(weight)} the shape {shown(state['shape'])}, whose codes take"
                                  f" {needed} bytes, but it has {len(codes)}")
        blocks = -(-values // packed_format.block_length)
        absmax = self.absmax(weight, state, blocks)
        code = self.part(f"{weight}.quant_map", weight, "codebook")
        if code.shape != (16,) or not torch.equal(code.float(), torch.tensor(packed_format.codebook)):
            raise self.error(key, f"{shown(f'{weight}.quant_map')} is not the codebook of {quant_type}", OTHER_FORM)
        return packed_tensor(packed_format, codes[:needed], shape, scale=absmax)

    def quant_state(self, key: str, quant_type: str) -> dict:
        """The checked fields of a quant_state."""
        text = self.tensors.pop(key)
        try:
            state = json.loads(bytes(text.view(-1).view(torch.uint8).tolist()))
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise self.error(key, f"{shown(key)} is not a JSON object")
        missing = [field for field in ("quant_type", "blocksize", "shape") if field not in state]
        if missing:
            raise self.error(key, f"{shown(key)} has no {' and no '.join(missing)}")
        if state["quant_type"] != quant_type:
            raise self.error(key, f"{shown(key)} says quant_type {shown(state['quant_type'])} inside")
        if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_LENGTHS:
            raise self.error(key, f"{shown(key)} says blocksize {shown(state['blocksize'])}; bitsandbytes writes"
                                  f" {', '.join(map(str, BLOCK_LENGTHS))}")
        shape = state["shape"]
        if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape) or (
                math.prod(shape) > MAX_ELEMENTS):
            raise self.error(key, f"{shown(key)} says shape {shown(shape)}, which no weight has")
        return state

    def absmax(self, weight: str, state: dict, blocks: int) -> torch.Tensor:
        """The scales of a 4-bit weight, float32 (blocks,), taken out of the tensors."""
        key = f"{weight}.absmax"
        absmax = self.part(key, weight, "scales").view(-1)
        if len(absmax) != blocks:
            raise self.error(key, f"{shown(key)} has {len(absmax)} scales, {shown(weight)} of shape {shown(state['shape'])} has"
                                  f" {blocks} blocks of {state['blocksize']}")
        if absmax.is_floating_point():
            return absmax.float()
        if absmax.dtype != torch.uint8:
            raise self.error(key, f"{shown(key)} has the type {self.entries[key].format}, expected F32, or U8 where it is"
                                  f" quantised itself")
        scales = self.part(f"{weight}.nested_absmax", weight, "scales of the scales").view(-1).float()
        code = self.part(f"{weight}.nested_quant_map", weight, "codebook of the scales").view(-1).float()
        length, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(length) is not int or length < 1 or type(offset) is not float or not math.isfinite(offset):
            raise self.error(key, f"{shown(key)} is quantised itself, but the quant_state of {shown(weight)} gives"
                                  f" nested_blocksize {shown(length)} and nested_offset {shown(offset)}")
        if len(scales) != -(-blocks // length) or len(code) != 256:
            raise self.error(key, f"{shown(key)} of {blocks} scales in blocks of {length} has {len(scales)} nested_absmax and"
                                  f" {len(code)} values in its nested_quant_map, expected {-(-blocks // length)} and 256")
        # bitsandbytes 0.50 `functional.dequantize_4bit`: each step rounds to float32.
        return (code[absmax.int()] * scales.repeat_interleave(length)[:blocks]).add_(torch.tensor(offset))

    def int8_weight(self, key: str, layer: str):
        """Puts the packed tensor in place of an int8 weight and its scales."""
        weight, scales = f"{layer}.weight", self.tensors.pop(key).view(-1)
        values = self.tensors.get(weight)
        if f"{layer}.comfy_quant" in self.tensors:
            raise self.error(key, f"{shown(weight)} has both {shown(key)} and {shown(f'{layer}.comfy_quant')}")
        if values is None or values.dtype != torch.int8 or values.ndim != 2 or not values.numel():
            found = "missing" if values is None else f"{self.entries[weight].format} {list(values.shape)}"
            raise self.error(key, f"{shown(weight)}, to which {shown(key)} belongs, is {found}, expected I8 [rows, columns]")
        if len(scales) != len(values) or not scales.is_floating_point():
            raise self.error(key, f"{shown(key)} has {len(scales)} scales of type {self.entries[key].format},"
                                  f" {shown(weight)} has {len(values)} rows")
        order = [self.tensors.pop(name, None) for name in (f"{layer}.weight_format", f"{weight}.weight_format")]
        if any(tensor is not None and tensor.tolist() not in (0, [0]) for tensor in order):
            raise self.error(key, f"{shown(weight)} is stored in tiles for one kind of GPU (its weight_format is not 0)",
                             "Get a conversion made with bitsandbytes 0.45 or newer.")
        self.tensors[weight] = packed_tensor(
            INT8.of_columns(values.shape[1]), values.view(torch.uint8), values.shape, scale=scales.float() / 127)

    def refuse_leftovers(self):
        for pattern, what, advice in LEFTOVERS:
            name = next((name for name in self.tensors if re.search(pattern, name)), None)
            if name is not None:
                raise self.error(name, f"{shown(name)} is {what}", advice)
        for name, tensor in self.tensors.items():
            if tensor.dtype == torch.uint8 and tensor.shape[1:] == (1,) and name.endswith(".weight"):
                raise self.error(name, f"{shown(name)} holds 4-bit codes of bitsandbytes, and its quant_state is missing")
