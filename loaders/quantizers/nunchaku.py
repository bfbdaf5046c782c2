"""Reads models that Nunchaku quantised: several tensors in the file, one packed tensor in memory.

`nunchaku_tiles` brings `PARTS` of a layer of (N, K) into rows; rows and columns are filled up to
multiples of 128. Scales of AWQ have a row for 64 columns, those of T5 for 128, and rows of padding.
The bias is plain, in tiles too. The result has diffusers' names and the values of the original
model:

- Layers after a GELU of int4 get their input + `INPUT_SHIFT`: it goes into their bias.
- Where `smooth_factor` is 1 and `smooth_factor_orig` is not, the latter was multiplied into the
  columns and divided out of the rows of the V before it. Both are undone, so that a LoRA fits.
- Rows of modulations are interleaved, and 1 is added to the bias of their scales.

Sources: deepcompressor-toolkit 0.1.0 `backend`, Nunchaku `models/transformers` and `models/
attention.py`, diffusers 0.42 `quantizers/nunchaku`.
"""
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...ops.formats.svdquant import (
    AWQ_INT4,
    AWQ_INT4_HALF,
    SVDQUANT_INT4,
    SVDQUANT_INT4_HALF,
    SVDQUANT_NVFP4,
)
from ...ops.log import log
from ...ops.tensor.packed_layout import (
    join_packed,
    packed_rows,
    with_input_shift,
    with_low_rank,
)
from ...ops.tensor.packed_tensor import PackedTensor
from ...ops.tensor.row_slicing import take_rows
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFile, WeightFileError, describe, safe_repr
from ..refusals.unsupported_quantizers import GET_OTHER_FORMAT
from . import nunchaku_tiles as tiles
from .base import HeaderOf, Layer, Quantizer, Read
from .comfy_quant_formats import HALVES, bias_of_shift
from .parts import Part, PartError

# End of a tensor's name that only files of Nunchaku have, and of one that its layers have in them.
MARK = re.compile(r"\.(wscales|wzeros|scaled_zeros)$")
PART = re.compile(r"\.(qweight|w\w?scales?|wzeros|scaled_zeros|(smooth_factor|smooth)(_orig)?"
                  r"|(proj|lora)_(down|up))$")
FLOATS = (*HALVES, torch.float32)
FP8 = torch.float8_e4m3fn
INT4_FAMILIES = {torch.bfloat16: SVDQUANT_INT4, torch.float16: SVDQUANT_INT4_HALF}
AWQ_FAMILIES = {torch.bfloat16: AWQ_INT4, torch.float16: AWQ_INT4_HALF}
AWQ_GROUP, T5_GROUP = 64, 128  # columns that share a scale
AWQ_PADDING = 16  # rows of scales, at most
DROPPED_BYTES = 1 << 28  # of the file, after which its pages leave the memory


def _svdquant_parts(scales: Part) -> dict[str, Part]:
    return {
        "qweight": Part("(N, K / 2)", (torch.int8,)), "wscales": scales,
        "smooth_factor": Part("(K,)", HALVES, other_names=("smooth",)),
        "smooth_factor_orig": Part("(K,)", HALVES, "smooth_orig", ("smooth_orig",)),
        "proj_down": Part("(K, R)", HALVES, "low rank", ("lora_down",)),
        "proj_up": Part("(N, R)", HALVES, "low rank", ("lora_up",)),
        "bias": Part("(N,)", HALVES, "bias")}


def _awq_parts(codes: Part, scales: str, zeros: str) -> dict[str, Part]:
    return {"qweight": codes, scales: Part("(S, N)", HALVES), zeros: Part("(S, N)", HALVES),
            "bias": Part("(N,)", FLOATS, "bias")}


AWQ_CODES = {torch.int32: Part("(N / 4, K / 2)", (torch.int32,)),
             torch.int16: Part("(N / 4, K)", (torch.int16,))}
AWQ_NUMBERS = {"AWQ": ("wscales", "wzeros"), "AWQ of T5": ("scales", "scaled_zeros")}
PARTS = {
    "SVDQuant int4": _svdquant_parts(Part("(K / 64, N)", HALVES)),
    "SVDQuant nvfp4": _svdquant_parts(Part("(K / 16, N)", (FP8,))) | {
        "wcscales": Part("(N,)", HALVES, "wcscales"), "wtscale": Part("1", FLOATS, "wtscale")},
    **{f"{name} in {'int16' if dtype == torch.int16 else 'int32'}": _awq_parts(codes, *numbers)
       for name, numbers in AWQ_NUMBERS.items() for dtype, codes in AWQ_CODES.items()},
}

_ATTENTION = {"norm_q": "attn.norm_q", "norm_k": "attn.norm_k", "qkv_proj": "attn.to_qkv"}
# Flux: kind of block -> layer in files of the first version -> layer in those of the second
FIRST_LAYERS = {
    "single_transformer_blocks": _ATTENTION | {"out_proj": "attn.to_out"},
    "transformer_blocks": _ATTENTION | {
        "norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k",
        "qkv_proj_context": "attn.add_qkv_proj", "out_proj": "attn.to_out.0",
        "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
    },
}
BLOCK = re.compile(r"((?:\w+_)?(?:transformer_blocks|layers|refiner)\.\d+)\.(.+)")

# layer of a block -> the layers whose rows it has
ROWS_OF = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.net.2": ("feed_forward.w2",),
}
# layer whose last third of rows is V -> those that multiply its output
AFTER_VALUES = {
    "attn.to_qkv": ("attn.to_out.0", "attn.to_out"), "attn.add_qkv_proj": ("attn.to_add_out",),
    "attention.to_qkv": ("attention.to_out.0",),
}
# Flux: two layers of a single block that ComfyUI has as one -> (their name in one, the axis along
# which they are joined, the layers whose biases it has)
JOINED = {
    ("attn.to_qkv", "mlp_fc1"): ("attn.to_qkv_mlp_proj", 0, (*ROWS_OF["attn.to_qkv"], "proj_mlp")),
    ("attn.to_out", "mlp_fc2"): ("proj_out", 1, ("proj_out",)),
}


@dataclass(frozen=True)
class Model:
    """Models whose blocks Nunchaku changes in one way.

    Attributes:
        mark: matches the name of a tensor of each such model.
        modulations: pattern of a layer of a block -> parts whose rows are interleaved in it.
        shifted: matches the layers of a block that come after a GELU.
        has_biases: whether its layers have biases; files have zeros in place of missing ones.
    """

    mark: re.Pattern
    modulations: Mapping[str, int]
    shifted: re.Pattern
    has_biases: bool = True


NOTHING = re.compile(r"(?!)")
FLUX = Model(re.compile(r"transformer_blocks\.\d+\.norm1\.linear\."),
             {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3},
             re.compile(r"ff(_context)?\.net\.2|mlp_fc2"))
QWEN_IMAGE = Model(re.compile(r"transformer_blocks\.\d+\.img_mod\.1\."),
                   {"img_mod.1": 6, "txt_mod.1": 6}, re.compile(r"(img|txt)_mlp\.net\.2"))
Z_IMAGE = Model(re.compile(r"layers\.\d+\.attention\.to_qkv\."), {}, NOTHING, has_biases=False)
MODELS = {"Flux": FLUX, "Qwen-Image": QWEN_IMAGE, "Z-Image": Z_IMAGE}
# layers that are quantised one by one, as diffusers' nunchaku_lite and encoders have them
SEPARATE = Model(NOTHING, {}, NOTHING)


def has_nunchaku_weights(names: Iterable[str]) -> bool:
    """Returns whether a file with tensors of these names has weights that Nunchaku quantised."""
    return any(map(MARK.search, names))


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the quantised layers of a file that has some of Nunchaku's."""
    if has_nunchaku_weights(names):
        yield from (PART.sub("", name) for name in names if PART.search(name))


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its codes."""
    codes, scales = layer.parts.get("qweight"), layer.parts.get("wscales")
    if codes is not None and codes.dtype in AWQ_CODES:
        name = "AWQ of T5" if "scaled_zeros" in layer.parts else "AWQ"
        return f"{name} in {'int16' if codes.dtype == torch.int16 else 'int32'}"
    is_nvfp4 = scales is not None and scales.dtype == FP8
    return "SVDQuant nvfp4" if is_nvfp4 else "SVDQuant int4"


@contextmanager
def session(file: WeightFile, tensors: dict[str, torch.Tensor]) -> Iterator[Read]:
    """Gives what reads a layer with what others of the model need, and names all other tensors.

    Layers are joined in other ways than the file has them, and a layer may have been multiplied by
    the smoothing of another one.
    """
    reader = _Reader(file, tensors)
    yield reader.read
    reader.finish()


@dataclass
class _Weight:
    """A layer's parts in the order of its rows.

    Attributes:
        main: packed (N, K).
        up, down: factors of the low rank, (N, R) and (R, K), or None.
        bias: (N,) or None.
        scales: what the rows and the columns of the low rank are multiplied by, float32 (N,) and
            (K,), or None.
        shift: what a shift of the input adds, float32 (N,), None where there is none.
    """

    main: PackedTensor
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    shift: torch.Tensor | None = None

    def packed(self) -> PackedTensor:
        """Returns the whole weight."""
        packed = self.main
        if self.up is not None and self.down is not None:
            packed = with_low_rank(packed, self.up, self.down, self.scales)
        return packed if self.shift is None else with_input_shift(packed, self.shift)


class _Reader:
    """Reads the layers of one file; layers have their names of the second version.

    Attributes:
        stored_names: layer -> its name in the file.
        unpaired: layers that are joined with another one.
        made: names of the tensors that layers became.
        factors: See `fused_factors`.
    """

    def __init__(self, file: WeightFile, tensors: dict[str, torch.Tensor]):
        self.file = file
        self.tensors = tensors
        names = (PART.sub("", name) for name in tensors if PART.search(name))
        self.stored_names = {second_name(name): name for name in names}
        self.unpaired: dict[str, _Weight] = {}
        self.made: set[str] = set()
        self.read_bytes = 0
        self.family = self.find_family()
        self.factors = self.fused_factors()

    def error(self, layer: str, problem: str, advice: str = DOWNLOAD_AGAIN) -> WeightFileError:
        """Returns an error about a layer, with its name in the file."""
        stored = self.stored_names.get(layer, layer)
        name = next((name for name in self.file.entries if name.startswith(f"{stored}.")), stored)
        return self.file.error_at(name, f"{safe_repr(stored)}, packed by Nunchaku, {problem}",
                                  advice)

    def read(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Returns the tensors that a layer becomes, by their names; none until its pair is read."""
        self.read_bytes += sum(part.nbytes for part in layer.parts.values())
        name, read = second_name(layer.name), (
            self.svdquant if layer.layout.startswith("SVDQuant") else self.awq)
        out = self.tensors_of(name, read(name, layer))
        twice = next((each for each in out if each in self.tensors), None)
        if twice is not None:
            raise PartError(f"it is in the file twice: {safe_repr(twice)} is there too")
        self.made |= out.keys()
        if self.read_bytes > DROPPED_BYTES:
            self.file.drop_pages()
            self.read_bytes = 0
        return out

    def finish(self):
        """Gives the tensors that are not quantised their names of the second version."""
        if self.unpaired:
            layer = next(iter(self.unpaired))
            raise self.error(
                layer, f"belongs to {safe_repr(self.joined_with(layer))}, which is not quantized or"
                " is missing; expected both")
        stored = set(self.stored_names.values())
        for name in [name for name in self.tensors if name not in self.made]:
            layer, _, part = name.rpartition(".")
            if layer in stored:
                raise self.error(layer, f"has a tensor {safe_repr(part)}, which is not known",
                                 GET_OTHER_FORMAT)
            if layer:
                self.add_plain(f"{second_name(layer)}.{part}", self.tensors.pop(name))
        if self.family is Z_IMAGE:
            self.split_plain_layers()

    def find_family(self) -> Model:
        """Returns the family of the model."""
        fused = [layer for layer in self.stored_names if _local_name(layer) in AFTER_VALUES]
        if not fused:
            return SEPARATE
        names = [second_name(name.rpartition(".")[0]) + "." for name in self.tensors]
        for family in MODELS.values():
            if any(map(family.mark.match, names)):
                return family
        raise self.error(
            fused[0],
            f"is of a model that is none of {', '.join(MODELS)}, and how Nunchaku changed its other"
            " layers is not known", GET_OTHER_FORMAT)

    def fused_factors(self) -> dict[str, torch.Tensor]:
        """Returns layer -> numbers that its columns were multiplied by, float32 (K,), and for the
        layer before it, whose rows of V were divided by them, the same."""
        factors, blocks = {}, {}
        for layer in self.stored_names:
            block, local = _split(layer)
            if local in AFTER_VALUES:
                afters = (f"{block}.{after}" for after in AFTER_VALUES[local])
                after = next((after for after in afters if after in self.stored_names), "")
                blocks.setdefault(block, {})[layer] = after
        for block, pairs in blocks.items():
            numbers = [self.fused_factor(after) for after in pairs.values()]
            present = [one for one in numbers if one is not None]
            if not present:
                continue
            # attention mixes the V of all of them, so their numbers are the same
            first = present[0]
            if len(present) < len(numbers) or not all(torch.equal(one, first) for one in present):
                log.warning(
                    "%s: the layers after the attention of %s are smoothed in"
                    " different ways, so LoRAs on them are not exact.", self.file.path.name, block)
                continue
            for layer, after in pairs.items():
                factors[layer] = factors[after] = first
        return factors

    def fused_factor(self, layer: str) -> torch.Tensor | None:
        """Returns the numbers in the columns of a layer, float32 (K,), None where there are none.
        """
        stored = self.stored_names.get(layer, layer)
        smooth, original = (
            next((tensor for name in (f"smooth_factor{end}", f"smooth{end}")
                  if (tensor := self.tensors.get(f"{stored}.{name}")) is not None), None)
            for end in ("", "_orig"))
        if smooth is None or original is None or smooth.shape != original.shape:
            return None
        if not bool((smooth == 1).all()) or bool((original == 1).all()):
            return None
        if original.ndim != 1 or len(original) % tiles.TILE or original.dtype not in HALVES:
            return None  # its layer is refused
        return tiles.vector_in_order(original).float()

    def svdquant(self, name: str, layer: Layer) -> _Weight:
        """Returns a layer of SVDQuant."""
        parts, rows, columns = layer.parts, layer.sizes["N"], layer.sizes["K"]
        if rows % tiles.TILE or columns % tiles.TILE or layer.sizes.get("R", 0) % tiles.RANKS:
            raise PartError(f"it has a weight of ({rows}, {columns}) and a low rank of"
                            f" {layer.sizes.get('R', 0)}, expected rows and columns in multiples"
                            f" of {tiles.TILE} and ranks of {tiles.RANKS}")
        of_rows = torch.ones(rows, dtype=torch.float32)
        if "wtscale" in parts:
            of_rows *= parts["wtscale"].float().view(-1)
        if "wcscales" in parts:
            of_rows *= tiles.vector_in_order(parts["wcscales"]).float()
        divisors = tiles.vector_in_order(parts["smooth_factor"]).float()
        if not bool((divisors.isfinite() & (divisors != 0)).all()):
            raise PartError("its smooth_factor has a 0 or a number that is not finite")
        up = tiles.up_in_rows(parts["proj_up"]) if "proj_up" in parts else None
        down = tiles.down_in_rows(parts["proj_down"]) if "proj_down" in parts else None
        bias = tiles.vector_in_order(parts["bias"]) if "bias" in parts else None

        factors, scales = self.factors.get(name), None
        if factors is not None:
            scales = (torch.ones(rows, dtype=torch.float32),
                      torch.ones(columns, dtype=torch.float32))
            if _local_name(name) in AFTER_VALUES:
                values = slice(_first_row_of_values(rows, factors), None)
                of_rows[values] *= factors
                scales[0][values] = factors
                if bias is not None:
                    bias = bias.float()
                    bias[values] *= factors
            else:
                divisors = divisors * factors
                scales[1].div_(factors)

        is_nvfp4 = parts["wscales"].dtype == FP8
        if is_nvfp4:
            family, sides = SVDQUANT_NVFP4, tiles.scale_bytes_in_rows
        else:
            family, sides = INT4_FAMILIES[parts["wscales"].dtype], tiles.numbers_in_rows
        main = packed_rows(
            family, tiles.codes_in_rows(parts["qweight"]), (rows, columns),
            scale=sides(parts["wscales"]), row_scale=of_rows, column_scale=1 / divisors)
        shift = None
        if bias is not None and not is_nvfp4 and self.family.shifted.fullmatch(_local_name(name)):
            shift = bias_of_shift(main)
            bias = bias.float() + shift
        return _Weight(main, up, down, bias, scales, shift)

    def awq(self, name: str, layer: Layer) -> _Weight:
        """Returns a layer of AWQ, the rows of its parts in order."""
        parts, rows, columns = layer.parts, layer.sizes["N"], layer.sizes["K"]
        is_t5, codes = "scaled_zeros" in parts, parts["qweight"]
        scale, zero = AWQ_NUMBERS["AWQ of T5" if is_t5 else "AWQ"]
        group = T5_GROUP if is_t5 else AWQ_GROUP
        groups = columns // group
        if columns % group or not groups <= layer.sizes["S"] <= (
                -(-groups // AWQ_PADDING) * AWQ_PADDING):
            raise PartError(f"it has {columns} columns and {scale} of {describe(parts[scale])},"
                            f" expected one for each {group} columns")
        if parts[scale].dtype != parts[zero].dtype:
            raise PartError(f"it has {scale} of {describe(parts[scale])}, but {zero} of"
                            f" {describe(parts[zero])}")
        in_rows = [tiles.awq_codes_in_rows(codes), *(
            parts[part][:groups].t().contiguous() for part in (scale, zero))]
        bias = parts.get("bias")
        count = self.family.modulations.get(_local_name(name))
        if count is not None:
            if rows % count:
                raise PartError(f"it has {rows} rows; expected a multiple of {count}")
            in_rows = [tiles.parts_in_order(tensor, count) for tensor in in_rows]
            if bias is not None:
                bias = tiles.parts_in_order(bias, count).float().view(count, -1)
                for part in {1, count - 2}:  # ComfyUI adds 1 to the scales itself
                    bias[part] -= 1
                bias = bias.view(-1)
        main = packed_rows(AWQ_FAMILIES[parts[scale].dtype], in_rows[0], (rows, columns), (group,),
                           scale=in_rows[1], minimum=in_rows[2])
        return _Weight(main, bias=None if bias is None else bias.clone())

    def tensors_of(self, layer: str, weight: _Weight) -> dict[str, torch.Tensor]:
        """Returns the tensors of a layer, under the names of the layers that it has rows of."""
        block, local = _split(layer)
        if self.family is FLUX and self.joined_with(layer) is not None:
            return self.tensors_of_joined(layer, weight)
        if weight.bias is not None and not self.family.has_biases and not weight.bias.any():
            weight.bias = None
        names = ROWS_OF.get(local, ()) if self.family is not SEPARATE else ()
        packed, biases = weight.packed(), [weight.bias]
        if not names:
            return _named([layer], [packed], biases)
        rows = len(weight.main) // len(names)
        if len(weight.main) % len(names):
            raise PartError(f"it has {len(weight.main)} rows; expected those of {len(names)}"
                            " layers")
        pieces = [slice(index * rows, (index + 1) * rows) for index in range(len(names))]
        return _named([f"{block}.{name}" for name in names],
                      [take_rows(packed, piece) for piece in pieces],
                      [None if weight.bias is None else weight.bias[piece] for piece in pieces])

    def joined_with(self, layer: str) -> str | None:
        """Returns the layer with which ComfyUI has a layer as one, or None."""
        block, local = _split(layer)
        if not block.startswith("single_"):
            return None
        for pair in JOINED:
            if local in pair:
                return f"{block}.{pair[1 - pair.index(local)]}"
        return None

    def tensors_of_joined(self, layer: str, weight: _Weight) -> dict[str, torch.Tensor]:
        """Returns the tensors of two layers that ComfyUI has as one, when both are read."""
        other = self.joined_with(layer)
        if other not in self.unpaired:
            self.unpaired[layer] = weight
            return {}
        block, local = _split(layer)
        both = {local: weight, _split(other)[1]: self.unpaired.pop(other)}
        (first, second), (name, axis, names) = next(
            (pair, target) for pair, target in JOINED.items() if local in pair)
        weights = both[first], both[second]
        if weights[0].main.shape[1 - axis] != weights[1].main.shape[1 - axis]:
            shapes = " and ".join(str(tuple(weight.main.shape)) for weight in weights)
            raise PartError(f"it and {safe_repr(other)} are of {shapes}; expected the same number"
                            f" of {('columns', 'rows')[axis]}")
        joined = join_packed([weight.packed() for weight in weights], axis)
        biases = [torch.zeros(len(weight.main), dtype=torch.float32)
                  if weight.bias is None else weight.bias for weight in weights]
        if axis == 1:
            biases = [biases[0].float() + biases[1].float()]
        else:
            biases = [*biases[0].chunk(len(names) - 1), biases[1]]
        return {f"{block}.{name}.weight": joined} | _named(
            [f"{block}.{target}" for target in names], [], biases)

    def add_plain(self, name: str, tensor: torch.Tensor):
        """Puts a tensor that is not quantised into `tensors`."""
        if name in self.tensors:
            raise self.error(name.rpartition(".")[0], f"is in the file twice: {safe_repr(name)} is"
                             " there too")
        self.tensors[name] = tensor

    def split_plain_layers(self):
        """Gives the feed-forward layers of Z-Image that are not quantised their names."""
        for name in list(self.tensors):
            layer, _, part = name.rpartition(".")
            block, local = _split(layer)
            if not local.startswith("feed_forward.net."):
                continue
            names = ROWS_OF.get(local, ())
            if not names or part != "weight":
                continue
            tensor = self.tensors.pop(name)
            for target, rows in zip(names, tensor.chunk(len(names))):
                self.add_plain(f"{block}.{target}.weight", rows)


def _named(layers: Iterable[str], weights: Iterable[torch.Tensor],
           biases: Iterable[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Returns weights and biases under the names of their layers."""
    layers = list(layers)
    return {f"{layer}.weight": weight for layer, weight in zip(layers, weights)} | {
        f"{layer}.bias": bias for layer, bias in zip(layers, biases) if bias is not None}


def _first_row_of_values(rows: int, factors: torch.Tensor) -> int:
    """Returns the row at which V begins in a layer of Q, K and V."""
    first = rows - rows // 3
    if rows - first != len(factors):
        raise PartError(f"it has {rows - first} rows of V, but the layer after it has"
                        f" {len(factors)} columns")
    return first


def second_name(layer: str) -> str:
    """Returns a layer's name in files of the second version, for one of any version."""
    match = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.([^.]+)(.*)", layer)
    if match is None:
        return layer
    block, number, local, rest = match.groups()
    return f"{block}.{number}.{FIRST_LAYERS[block].get(local, local)}{rest}"


def _split(layer: str) -> tuple[str, str]:
    """Returns the block of a layer, "" for none, and the layer's name in it."""
    match = BLOCK.fullmatch(layer)
    return (match[1], match[2]) if match else ("", layer)


def _local_name(layer: str) -> str:
    return _split(layer)[1]


QUANTIZER = Quantizer(
    name="Nunchaku", methods={"nunchaku_lite": "Nunchaku", "svdquant": "Nunchaku"}, find=find,
    layouts=PARTS, layout=layout, session=session)
