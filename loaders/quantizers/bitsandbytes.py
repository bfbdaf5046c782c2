"""Reads weights that bitsandbytes packed: several tensors in the file, one packed tensor in memory.

`QUANTIZER` makes one packed tensor of the parts of each weight, under the weight's key, so that
ComfyUI sees the shapes of the dense model:

| in the file (weight `X` of [N, K]) | in the state dict |
|---|---|
| `X` codes, `X.absmax`, `X.quant_map`, `X.quant_state.bitsandbytes__nf4` or `__fp4` | `X` packed |
| the same and `X.nested_absmax`, `X.nested_quant_map`: absmax is quantised too | `X` packed |
| `L.weight` int8, `L.SCB` or `L.weight.SCB` float32 [N], `L.weight_format` | `L.weight` packed |
"""
import math
import re

import torch

from ...ops.bounded_json import read_json
from ...ops.formats.bnb_4bit import FP4, NF4, Codebook4Bit
from ...ops.formats.bnb_int8 import INT8
from ...ops.tensor.packed_layout import packed_rows, packed_tensor
from ..files.container import AGAIN, COUNTABLE, ProgressIter, WeightFile, WeightFileError, safe_repr
from .base import Quantizer
from .unsupported_quantizers import OTHER_FORM, reject_names

QUANT_TYPES: dict[str, Codebook4Bit] = {"nf4": NF4.of(), "fp4": FP4.of()}
# bitsandbytes' `quant_storage`
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
# bitsandbytes 0.50 `functional.quantize_4bit`
BLOCK_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

QUANT_STATE = re.compile(
    r"(?P<weight>.+)(?<!absmax)(?<!quant_map)(?<!SCB)\.quant_state\.bitsandbytes__(?P<quant_type>\w+)"
)
INT8_SCALES = re.compile(r"(?P<layer>.+?)(\.weight)?\.SCB")

# End of a name that only files with packed weights have, never files that ComfyUI reads itself.
MARK = re.compile(r"\.(quant_state\.bitsandbytes__\w+|SCB)$")
# End of the name of a tensor that belongs to a 4-bit weight.
PART = re.compile(r"\.((nested_)?absmax|(nested_)?quant_map|quant_state\.\w+)$")

# Tensors that remain if other parts of a weight are missing: end of the name -> what the tensor is.
LEFTOVERS = {
    r"\.(nested_)?absmax$|\.(nested_)?quant_map$|\.quant_state(\..*)?$":
        "part of a bitsandbytes 4-bit weight whose other parts are not in the file",
    r"\.SCB$|\.weight_format$":
        "part of a bitsandbytes int8 weight whose other parts are not in the file",
}


def formats_in(file: WeightFile) -> dict[str, str]:
    """Returns name -> format of each weight; the parts of a bitsandbytes weight count as one."""
    matches = filter(None, map(QUANT_STATE.fullmatch, file.entries))
    packed = {match["weight"]: match["quant_type"].upper() for match in matches}
    return {
        name: packed.get(name, entry.format)
        for name, entry in file.entries.items()
        if PART.sub("", name) not in packed or name in packed
    }


class _PartJoiner:
    """Takes the parts of each weight out of `tensors` and puts the packed weight in."""

    def __init__(self, file: WeightFile, tensors: dict[str, torch.Tensor]):
        self.file = file
        self.entries = file.entries
        self.tensors = tensors

    def error(self, key: str, problem: str, advice: str = AGAIN) -> WeightFileError:
        """Returns an error about the tensor `key` that names its file."""
        return self.file.error_at(key, problem, advice)

    def join(self, track: ProgressIter):
        for key in track(list(self.entries)):
            if match := QUANT_STATE.fullmatch(key):
                weight = match["weight"]
                self.tensors[weight] = self.join_4bit(key, weight, match["quant_type"])
            elif match := INT8_SCALES.fullmatch(key):
                self.join_int8(key, match["layer"])
        self.reject_leftovers()

    def take(self, key: str, weight: str, what: str) -> torch.Tensor:
        """Removes one part of a weight from the tensors and returns it."""
        if key not in self.tensors:
            raise self.error(weight,
                             f"{safe_repr(key)} is missing, the {what} of {safe_repr(weight)}")
        return self.tensors.pop(key)

    def join_4bit(self, key: str, weight: str, quant_type: str) -> torch.Tensor:
        """Returns the packed tensor of a 4-bit weight and removes its parts from the tensors.

        Args:
            key: name of the quant_state.
            weight: name of the weight.
            quant_type: "nf4" or "fp4", as `key` names it.
        """
        if quant_type not in QUANT_TYPES:
            known = " or ".join(QUANT_TYPES)
            raise self.error(
                key,
                f"{safe_repr(key)} names the quant_type {safe_repr(quant_type)}; expected {known}",
                OTHER_FORM)
        if any(f"{weight}.quant_state.bitsandbytes__{other}" in self.tensors
               for other in QUANT_TYPES if other != quant_type):
            raise self.error(key, f"{safe_repr(weight)} has two quant_states")
        state = self.quant_state(key, quant_type)
        packed_format = QUANT_TYPES[quant_type].of_block_length(state["blocksize"])
        shape = tuple(state["shape"])
        values = math.prod(shape)
        if weight not in self.tensors:
            raise self.error(
                key, f"{safe_repr(weight)} is missing, but its {safe_repr(key)} is in the file")
        stored = self.tensors[weight]
        if stored.dtype not in STORAGE_DTYPES:
            raise self.error(
                key,
                f"{safe_repr(weight)} has the type {self.entries[weight].format}, in which"
                " bitsandbytes does not store 4-bit codes")
        codes = stored.contiguous().view(-1).view(torch.uint8)
        needed = -(-values // 2)
        if not needed <= len(codes) < needed + stored.dtype.itemsize:
            raise self.error(
                key,
                f"{safe_repr(key)} gives {safe_repr(weight)} the shape"
                f" {safe_repr(state['shape'])}, for which {needed} bytes of codes are expected, but"
                f" it has {len(codes)}")
        blocks = -(-values // packed_format.block_length)
        absmax = self.absmax(weight, state, blocks)
        codebook = self.take(f"{weight}.quant_map", weight, "codebook")
        expected = torch.tensor(packed_format.codebook, dtype=torch.float32)
        if codebook.shape != (16,) or not torch.equal(codebook.float(), expected):
            raise self.error(
                key, f"{safe_repr(f'{weight}.quant_map')} is not the codebook of {quant_type}",
                OTHER_FORM)
        return packed_tensor(packed_format, codes[:needed], shape, scale=absmax)

    def quant_state(self, key: str, quant_type: str) -> dict:
        """Removes a quant_state from the tensors and returns its checked fields."""
        text = self.tensors.pop(key)
        try:
            state = read_json(bytes(text.view(-1).view(torch.uint8).tolist()))
        except ValueError:
            state = None
        if not isinstance(state, dict):
            raise self.error(key, f"{safe_repr(key)} is not a JSON object")
        missing = [field for field in ("quant_type", "blocksize", "shape") if field not in state]
        if missing:
            raise self.error(key, f"{safe_repr(key)} has no {' and no '.join(missing)}")
        if state["quant_type"] != quant_type:
            raise self.error(
                key,
                f"{safe_repr(key)} contains quant_type {safe_repr(state['quant_type'])}")
        if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_LENGTHS:
            raise self.error(
                key,
                f"{safe_repr(key)} has blocksize {safe_repr(state['blocksize'])}; bitsandbytes"
                f" writes {', '.join(map(str, BLOCK_LENGTHS))}")
        shape = state["shape"]
        if (
            not isinstance(shape, list)
            or not shape
            or not all(type(size) is int and size > 0 for size in shape)
            or math.prod(shape) > COUNTABLE
        ):
            raise self.error(
                key, f"{safe_repr(key)} has shape {safe_repr(shape)}, which is not a weight's")
        return state

    def absmax(self, weight: str, state: dict, blocks: int) -> torch.Tensor:
        """Removes the scales of a 4-bit weight from the tensors; returns them as float32 (blocks,).

        Args:
            weight: name of the weight.
            state: its quant_state.
            blocks: number of scales expected.
        """
        key = f"{weight}.absmax"
        absmax = self.take(key, weight, "scales").view(-1)
        if len(absmax) != blocks:
            raise self.error(
                key,
                f"{safe_repr(key)} has {len(absmax)} scales, but {safe_repr(weight)} of shape"
                f" {safe_repr(state['shape'])} has {blocks} blocks of {state['blocksize']}")
        if absmax.is_floating_point():
            return absmax.float()
        if absmax.dtype != torch.uint8:
            raise self.error(
                key,
                f"{safe_repr(key)} has the type {self.entries[key].format}, expected F32, or U8"
                " if it is quantised too")
        scales = self.take(f"{weight}.nested_absmax", weight, "scales of the scales")
        scales = scales.view(-1).float()
        codebook = self.take(f"{weight}.nested_quant_map", weight, "codebook of the scales")
        codebook = codebook.view(-1).float()
        length, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if (
            type(length) is not int
            or length < 1
            or type(offset) is not float
            or not math.isfinite(offset)
        ):
            raise self.error(
                key,
                f"{safe_repr(key)} is quantised, but the quant_state of {safe_repr(weight)}"
                f" gives nested_blocksize {safe_repr(length)} and nested_offset"
                f" {safe_repr(offset)}")
        if len(scales) != -(-blocks // length) or len(codebook) != 256:
            raise self.error(
                key,
                f"{safe_repr(key)} of {blocks} scales in blocks of {length} has {len(scales)}"
                f" nested_absmax and {len(codebook)} values in its nested_quant_map, expected"
                f" {-(-blocks // length)} and 256"
            )
        # bitsandbytes 0.50 `functional.dequantize_4bit`: each step rounds to float32.
        return (codebook[absmax.int()] * scales.repeat_interleave(length)[:blocks]).add_(
            torch.tensor(offset, dtype=torch.float32))

    def join_int8(self, key: str, layer: str):
        """Replaces an int8 weight and its scales, the tensor `key`, with one packed tensor."""
        weight, scales = f"{layer}.weight", self.tensors.pop(key).view(-1)
        values = self.tensors.get(weight)
        if f"{layer}.comfy_quant" in self.tensors:
            raise self.error(
                key,
                f"{safe_repr(weight)} has both {safe_repr(key)} and"
                f" {safe_repr(f'{layer}.comfy_quant')}"
            )
        if values is None or values.dtype != torch.int8 or values.ndim != 2 or not values.numel():
            actual = (
                "missing"
                if values is None
                else f"{self.entries[weight].format} {list(values.shape)}"
            )
            raise self.error(
                key,
                f"{safe_repr(weight)}, to which {safe_repr(key)} belongs, is {actual}, expected I8"
                " [rows, columns]"
            )
        if len(scales) != len(values) or not scales.is_floating_point():
            raise self.error(
                key,
                f"{safe_repr(key)} has {len(scales)} scales of type {self.entries[key].format},"
                f" but {safe_repr(weight)} has {len(values)} rows")
        layouts = [
            self.tensors.pop(name, None)
            for name in (f"{layer}.weight_format", f"{weight}.weight_format")
        ]
        if any(tensor is not None and (tensor.numel() != 1 or tensor.any()) for tensor in layouts):
            raise self.error(
                key,
                f"{safe_repr(weight)} is stored in tiles for one GPU generation (its weight_format"
                " is not 0)",
                "Get a conversion made with bitsandbytes 0.45 or newer.")
        self.tensors[weight] = packed_rows(INT8, values, values.shape, scale=scales.float() / 127)

    def reject_leftovers(self):
        reject_names(self.file, self.tensors, LEFTOVERS, AGAIN)
        for name, tensor in self.tensors.items():
            if (
                tensor.dtype == torch.uint8
                and tensor.shape[1:] == (1,)
                and name.endswith(".weight")
            ):
                raise self.error(
                    name,
                    f"{safe_repr(name)} holds 4-bit codes of bitsandbytes, but its quant_state is"
                    " missing"
                )


QUANTIZER = Quantizer(
    name="bitsandbytes", methods={"bitsandbytes": "bitsandbytes (4-bit NF4 and FP4, int8)"},
    is_in=lambda names, metadata, type_of: any(map(MARK.search, names)),
    join=lambda file, tensors, track: _PartJoiner(file, tensors).join(track))
