"""Reads models that Nunchaku quantised: several tensors in the file, one packed tensor in memory.

The tensors of layer `L` of (N, K), which `nunchaku_tiles` brings into rows; rows and columns are
filled up to multiples of 128:

| SVDQuant | first names | shape | type |
|---|---|---|---|
| `L.qweight` | | (N, K / 2) | int8, codes of 4 bits |
| `L.wscales` | | (K / 64, N); nvfp4: (K / 16, N) | 16 bits; nvfp4: fp8 E4M3 |
| `L.wcscales`, nvfp4 only | | (N,) | 16 bits |
| `L.wtscale`, nvfp4 only | | (1,) | float |
| `L.smooth_factor` | `smooth` | (K,) | 16 bits |
| `L.smooth_factor_orig` | `smooth_orig` | (K,) | 16 bits |
| `L.proj_down`, `L.proj_up` | `lora_down`, `lora_up` | (K, R), (N, R) | 16 bits |

| AWQ | shape | type |
|---|---|---|
| `L.qweight` | (N / 4, K / 2) or (N / 4, K) | int32 or int16 |
| `L.wscales`, `L.wzeros` | (K / 64, N), and rows of padding | 16 bits |
| T5: `L.scales`, `L.scaled_zeros` | (K / 128, N), likewise | 16 bits |

`L.bias` is plain, in tiles too. The result has diffusers' names and the values of the original
model:

- Layers after a GELU of int4 get their input + `SHIFT`: it goes into their bias.
- Where `smooth_factor` is 1 and `smooth_factor_orig` is not, the latter was multiplied into the
  columns and divided out of the rows of the V before it. Both are undone, so that a LoRA fits.
- Rows of modulations are interleaved, and 1 is added to the bias of their scales.

Sources: deepcompressor-toolkit 0.1.0 `backend`, Nunchaku `models/transformers` and `models/
attention.py`, diffusers 0.42 `quantizers/nunchaku`.
"""
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...ops.formats.comfyui import NVFP4_GROUP
from ...ops.formats.svdquant import (
    AWQ_INT4,
    AWQ_INT4_HALF,
    INT4_GROUP,
    SVDQUANT_INT4,
    SVDQUANT_INT4_HALF,
    SVDQUANT_NVFP4,
)
from ...ops.tensor.packed_layout import join_packed, packed_rows, with_low_rank
from ...ops.tensor.packed_tensor import PackedTensor
from ...ops.tensor.row_slicing import take_rows
from ..files.container import AGAIN, ProgressIter, WeightFile, WeightFileError, describe, safe_repr
from . import nunchaku_tiles as tiles
from .base import Quantizer
from .comfyui import HALVES, bias_of_shift
from .unsupported_quantizers import OTHER_FORM

log = logging.getLogger(__name__)

# End of a tensor's name that only files of Nunchaku have, and of one that its layers have in them.
MARK = re.compile(r"\.(wscales|wzeros|scaled_zeros)$")
PART = re.compile(r"\.(qweight|w\w?scales?|wzeros|scaled_zeros|(smooth_factor|smooth)(_orig)?"
                  r"|(proj|lora)_(down|up))$")
FIRST_PARTS = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor",
               "smooth_orig": "smooth_factor_orig"}
FLOATS = (*HALVES, torch.float32)
INT4_FAMILIES = {torch.bfloat16: SVDQUANT_INT4, torch.float16: SVDQUANT_INT4_HALF}
AWQ_FAMILIES = {torch.bfloat16: AWQ_INT4, torch.float16: AWQ_INT4_HALF}
AWQ_GROUP, T5_GROUP = 64, 128  # columns that share a scale
AWQ_PADDING = 16  # rows of scales, at most
DROPPED_BYTES = 1 << 28  # of the file, after which its pages leave the memory

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
class Family:
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
FLUX = Family(re.compile(r"transformer_blocks\.\d+\.norm1\.linear\."),
              {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3},
              re.compile(r"ff(_context)?\.net\.2|mlp_fc2"))
QWEN_IMAGE = Family(re.compile(r"transformer_blocks\.\d+\.img_mod\.1\."),
                    {"img_mod.1": 6, "txt_mod.1": 6}, re.compile(r"(img|txt)_mlp\.net\.2"))
Z_IMAGE = Family(re.compile(r"layers\.\d+\.attention\.to_qkv\."), {}, NOTHING, has_biases=False)
MODELS = {"Flux": FLUX, "Qwen-Image": QWEN_IMAGE, "Z-Image": Z_IMAGE}
# layers that are quantised one by one, as diffusers' nunchaku_lite and encoders have them
SEPARATE = Family(NOTHING, {}, NOTHING)


def has_nunchaku_weights(names: Iterable[str]) -> bool:
    """Returns whether a file with tensors of these names has weights that Nunchaku quantised."""
    return any(map(MARK.search, names))


def _join(file: WeightFile, tensors: dict[str, torch.Tensor], track: ProgressIter):
    """Replaces the parts of each weight with one packed tensor in diffusers' names.

    Raises:
        WeightFileError: parts of a weight are missing, unknown or do not belong together, or the
            model is of none of the known families.
    """
    if has_nunchaku_weights(tensors):
        _Reader(file, tensors).join(track)


@dataclass
class _Weight:
    """A layer's parts in the order of its rows.

    Attributes:
        main: packed (N, K).
        up, down: factors of the low rank, (N, R) and (R, K), or None.
        bias: (N,) or None.
        scales: what the rows and the columns of the low rank are multiplied by, float32 (N,) and
            (K,), or None.
    """

    main: PackedTensor
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None

    def packed(self) -> PackedTensor:
        """Returns the whole weight."""
        if self.up is None or self.down is None:
            return self.main
        return with_low_rank(self.main, self.up, self.down, self.scales)


class _Reader:
    """Takes the parts of each layer out of `tensors` and puts the packed weight in."""

    def __init__(self, file: WeightFile, tensors: dict[str, torch.Tensor]):
        self.file = file
        self.tensors = tensors
        self.layers: dict[str, dict[str, torch.Tensor]] = {}
        self.stored_names: dict[str, str] = {}  # layer -> its name in the file
        self.unpaired: dict[str, _Weight] = {}  # layers that are joined with another one
        self.sort_parts()
        self.family = self.find_family()
        self.factors = self.fused_factors()

    def error(self, layer: str, problem: str, advice: str = AGAIN) -> WeightFileError:
        """Returns an error about a layer, with its name in the file."""
        stored = self.stored_names.get(layer, layer)
        name = next((name for name in self.file.entries if name.startswith(f"{stored}.")), stored)
        return self.file.error_at(name, f"{safe_repr(stored)}, quantised by Nunchaku, {problem}",
                                  advice)

    def sort_parts(self):
        """Moves the parts of quantised layers to `layers`, and gives all others their names."""
        quantized = {PART.sub("", name) for name in self.tensors if PART.search(name)}
        for name in list(self.tensors):
            layer, _, part = name.rpartition(".")
            tensor = self.tensors.pop(name)
            target = second_name(layer)
            if layer not in quantized:
                self.tensors[f"{target}.{part}" if layer else name] = tensor
                continue
            part = FIRST_PARTS.get(part, part)
            parts = self.layers.setdefault(target, {})
            self.stored_names[target] = layer
            if part in parts:
                raise self.error(target, f"has two tensors {part}")
            parts[part] = tensor

    def find_family(self) -> Family:
        """Returns the family of the model."""
        fused = [layer for layer in self.layers if _local_name(layer) in AFTER_VALUES]
        if not fused:
            return SEPARATE
        names = [*self.tensors, *(f"{layer}." for layer in self.layers)]
        for family in MODELS.values():
            if any(map(family.mark.match, names)):
                return family
        raise self.error(
            fused[0],
            f"is of a model that is none of {', '.join(MODELS)}, and how Nunchaku changed its other"
            " layers is not known", OTHER_FORM)

    def fused_factors(self) -> dict[str, torch.Tensor]:
        """Returns layer -> numbers that its columns were multiplied by, float32 (K,), and for the
        layer before it, whose rows of V were divided by them, the same."""
        factors, blocks = {}, {}
        for layer in self.layers:
            block, local = _split(layer)
            if local in AFTER_VALUES:
                afters = (f"{block}.{after}" for after in AFTER_VALUES[local])
                after = next((after for after in afters if after in self.layers), "")
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
                    "[Featherweight] %s: the layers after the attention of %s are smoothed in"
                    " different ways, so LoRAs on them are not exact.", self.file.path.name, block)
                continue
            for layer, after in pairs.items():
                factors[layer] = factors[after] = first
        return factors

    def fused_factor(self, layer: str) -> torch.Tensor | None:
        """Returns the numbers in the columns of a layer, float32 (K,), None where there are none.
        """
        parts = self.layers.get(layer, {})
        smooth, original = parts.get("smooth_factor"), parts.get("smooth_factor_orig")
        if smooth is None or original is None or smooth.shape != original.shape:
            return None
        if not bool((smooth == 1).all()) or bool((original == 1).all()):
            return None
        return self.vector(layer, "smooth_factor_orig", original).float()

    def join(self, track: ProgressIter):
        """Packs all layers, one after another."""
        read_bytes = 0
        for layer in track(list(self.layers)):
            parts = self.layers.pop(layer)
            read_bytes += sum(part.nbytes for part in parts.values())
            weight = self.weight(layer, parts)
            parts.clear()
            self.place(layer, weight)
            if read_bytes > DROPPED_BYTES:
                self.file.drop_pages()
                read_bytes = 0
        if self.unpaired:
            layer = next(iter(self.unpaired))
            other = self.partner(layer)
            raise self.error(layer, f"belongs to {safe_repr(other)}, which is not quantised or is"
                             " missing; expected both")
        if self.family is Z_IMAGE:
            self.split_plain_layers()

    def weight(self, layer: str, parts: dict[str, torch.Tensor]) -> _Weight:
        """Returns a layer of SVDQuant or of AWQ."""
        codes = parts.get("qweight")
        if codes is None:
            raise self.error(layer, f"has {', '.join(sorted(parts))}, but no qweight")
        if codes.ndim != 2 or not codes.numel():
            raise self.error(layer, f"has a qweight of {describe(codes)}; expected two dimensions")
        if codes.dtype == torch.int8:
            return self.svdquant(layer, parts)
        if codes.dtype in (torch.int16, torch.int32):
            return self.awq(layer, parts)
        raise self.error(layer, f"has a qweight of {describe(codes)}; expected int8 of SVDQuant,"
                         " or int32 or int16 of AWQ")

    def check(self, layer: str, parts: Mapping[str, torch.Tensor],
              expected: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
              optional: Iterable[str] = ()):
        """Raises WeightFileError where the parts are not those that are expected.

        Args:
            layer: name of the layer.
            parts: its tensors.
            expected: part -> (shape, dtypes).
            optional: those that may be missing.
        """
        unknown = sorted(set(parts) - set(expected))
        if unknown:
            raise self.error(layer, f"has a tensor {safe_repr(unknown[0])}, which is not known;"
                             f" expected {', '.join(expected)}", OTHER_FORM)
        for part, (shape, dtypes) in expected.items():
            tensor = parts.get(part)
            if tensor is None:
                if part not in optional:
                    raise self.error(layer, f"has no {part}; expected {', '.join(expected)}")
            elif tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                names = " or ".join(map(_dtype_name, dtypes))
                raise self.error(
                    layer, f"has {part} of {describe(tensor)}; expected {names} {shape}, since its"
                    f" qweight is {describe(parts['qweight'])}")

    def vector(self, layer: str, part: str, stored: torch.Tensor) -> torch.Tensor:
        """Returns numbers of rows or columns in their order."""
        if stored.ndim != 1 or len(stored) % tiles.TILE or stored.dtype not in HALVES:
            raise self.error(layer, f"has {part} of {describe(stored)}; expected 16 bits of a"
                             f" multiple of {tiles.TILE}")
        return tiles.vector_in_order(stored)

    def svdquant(self, layer: str, parts: dict[str, torch.Tensor]) -> _Weight:
        """Returns a layer of SVDQuant."""
        is_nvfp4 = self.check_svdquant(layer, parts)
        rows, columns = len(parts["qweight"]), parts["qweight"].shape[1] * 2
        of_rows = torch.ones(rows, dtype=torch.float32)
        if "wtscale" in parts:
            of_rows *= parts["wtscale"].float()
        if "wcscales" in parts:
            of_rows *= tiles.vector_in_order(parts["wcscales"]).float()
        divisors = tiles.vector_in_order(parts["smooth_factor"]).float()
        if not bool((divisors.isfinite() & (divisors != 0)).all()):
            raise self.error(layer, "has a smooth_factor with 0 or without a finite number")
        up = tiles.up_in_rows(parts["proj_up"]) if "proj_up" in parts else None
        down = tiles.down_in_rows(parts["proj_down"]) if "proj_down" in parts else None
        bias = tiles.vector_in_order(parts["bias"]) if "bias" in parts else None

        factors, scales = self.factors.get(layer), None
        if factors is not None:
            scales = (torch.ones(rows, dtype=torch.float32),
                      torch.ones(columns, dtype=torch.float32))
            if _local_name(layer) in AFTER_VALUES:
                values = slice(self.first_row_of_values(layer, rows, factors), None)
                of_rows[values] *= factors
                scales[0][values] = factors
                if bias is not None:
                    bias = bias.float()
                    bias[values] *= factors
            else:
                divisors = divisors * factors
                scales[1].div_(factors)

        if is_nvfp4:
            family, sides = SVDQUANT_NVFP4, tiles.scale_bytes_in_rows
        else:
            family, sides = INT4_FAMILIES[parts["wscales"].dtype], tiles.numbers_in_rows
        main = packed_rows(
            family, tiles.codes_in_rows(parts["qweight"]), (rows, columns),
            scale=sides(parts["wscales"]), row_scale=of_rows, column_scale=1 / divisors)
        if bias is not None and not is_nvfp4 and self.family.shifted.fullmatch(_local_name(layer)):
            bias = bias.float() + bias_of_shift(main)
        return _Weight(main, up, down, bias, scales)

    def check_svdquant(self, layer: str, parts: dict[str, torch.Tensor]) -> bool:
        """Checks the parts of a layer of SVDQuant; returns whether it is nvfp4, otherwise int4."""
        codes, scales = parts["qweight"], parts.get("wscales")
        rows, columns = len(codes), codes.shape[1] * 2
        if rows % tiles.TILE or columns % tiles.TILE:
            raise self.error(layer, f"has a qweight of {describe(codes)}; expected rows and"
                             f" columns in multiples of {tiles.TILE}")
        is_nvfp4 = scales is not None and scales.dtype == torch.float8_e4m3fn
        if "wtscale" in parts:
            parts["wtscale"] = parts["wtscale"].view(-1)
        scale_dtypes = (torch.float8_e4m3fn,) if is_nvfp4 else HALVES
        group = NVFP4_GROUP if is_nvfp4 else INT4_GROUP
        expected = {"qweight": ((rows, columns // 2), (torch.int8,)),
                    "wscales": ((columns // group, rows), scale_dtypes),
                    "smooth_factor": ((columns,), HALVES),
                    "smooth_factor_orig": ((columns,), HALVES), "bias": ((rows,), HALVES)}
        if is_nvfp4:
            expected |= {"wcscales": ((rows,), HALVES), "wtscale": ((1,), FLOATS)}
        if "proj_down" in parts or "proj_up" in parts:
            down = parts.get("proj_down")
            rank = down.shape[-1] if down is not None and down.ndim == 2 else 0
            rank = max(1, -(-rank // tiles.RANKS)) * tiles.RANKS
            expected |= {"proj_down": ((columns, rank), HALVES), "proj_up": ((rows, rank), HALVES)}
        self.check(layer, parts, expected, ["wcscales", "wtscale", "smooth_factor_orig", "bias"])
        return is_nvfp4

    def first_row_of_values(self, layer: str, rows: int, factors: torch.Tensor) -> int:
        """Returns the row at which V begins in a layer of Q, K and V."""
        first = rows - rows // 3
        if rows - first != len(factors):
            raise self.error(layer, f"has {rows - first} rows of V, but the layer after it has"
                             f" {len(factors)} columns")
        return first

    def awq(self, layer: str, parts: dict[str, torch.Tensor]) -> _Weight:
        """Returns a layer of AWQ, the rows of its parts in order."""
        codes = parts["qweight"]
        rows, columns = len(codes) * 4, codes.nbytes // len(codes) // 2
        is_t5 = "scaled_zeros" in parts
        scale, zero = ("scales", "scaled_zeros") if is_t5 else ("wscales", "wzeros")
        group = T5_GROUP if is_t5 else AWQ_GROUP
        if columns % max(group, 64):
            raise self.error(layer, f"has a qweight of {describe(codes)}; expected columns in"
                             f" multiples of {group}")
        groups = columns // group
        stored = parts.get(scale)
        count = stored.shape[0] if stored is not None and stored.ndim == 2 else groups
        if not groups <= count <= -(-groups // AWQ_PADDING) * AWQ_PADDING:
            count = groups
        expected = {"qweight": (tuple(codes.shape), (codes.dtype,)),
                    scale: ((count, rows), HALVES), zero: ((count, rows), HALVES),
                    "bias": ((rows,), FLOATS)}
        self.check(layer, parts, expected, ["bias"])
        if parts[scale].dtype != parts[zero].dtype:
            raise self.error(layer, f"has {scale} of {describe(parts[scale])}, but {zero} of"
                             f" {describe(parts[zero])}")
        in_rows = [tiles.awq_codes_in_rows(codes), *(
            parts[part][:groups].t().contiguous() for part in (scale, zero))]
        bias = parts.get("bias")
        count = self.family.modulations.get(_local_name(layer))
        if count is not None:
            if rows % count:
                raise self.error(layer, f"has {rows} rows; expected a multiple of {count}")
            in_rows = [tiles.parts_in_order(tensor, count) for tensor in in_rows]
            if bias is not None:
                bias = tiles.parts_in_order(bias, count).float().view(count, -1)
                for part in {1, count - 2}:  # ComfyUI adds 1 to the scales itself
                    bias[part] -= 1
                bias = bias.view(-1)
        main = packed_rows(AWQ_FAMILIES[parts[scale].dtype], in_rows[0], (rows, columns), (group,),
                           scale=in_rows[1], minimum=in_rows[2])
        return _Weight(main, bias=None if bias is None else bias.clone())

    def place(self, layer: str, weight: _Weight):
        """Puts a layer into `tensors`, under the names of the layers that it has rows of."""
        block, local = _split(layer)
        if self.family is FLUX and self.partner(layer) is not None:
            return self.place_joined(layer, weight)
        if weight.bias is not None and not self.family.has_biases and not weight.bias.any():
            weight.bias = None
        names = ROWS_OF.get(local, ()) if self.family is not SEPARATE else ()
        if not names:
            return self.put(layer, weight.packed(), weight.bias)
        rows = len(weight.main) // len(names)
        if len(weight.main) % len(names):
            raise self.error(layer, f"has {len(weight.main)} rows; expected those of"
                             f" {len(names)} layers")
        packed = weight.packed()
        for index, name in enumerate(names):
            piece = slice(index * rows, (index + 1) * rows)
            bias = None if weight.bias is None else weight.bias[piece]
            self.put(f"{block}.{name}", take_rows(packed, piece), bias)
        return None

    def partner(self, layer: str) -> str | None:
        """Returns the layer with which ComfyUI has a layer as one, or None."""
        block, local = _split(layer)
        if not block.startswith("single_"):
            return None
        for pair in JOINED:
            if local in pair:
                return f"{block}.{pair[1 - pair.index(local)]}"
        return None

    def place_joined(self, layer: str, weight: _Weight):
        """Puts the two layers that ComfyUI has as one into `tensors`, when both are read."""
        other = self.partner(layer)
        if other not in self.unpaired:
            self.unpaired[layer] = weight
            return
        block, local = _split(layer)
        both = {local: weight, _split(other)[1]: self.unpaired.pop(other)}
        (first, second), (name, axis, names) = next(
            (pair, target) for pair, target in JOINED.items() if local in pair)
        weights = both[first], both[second]
        if weights[0].main.shape[1 - axis] != weights[1].main.shape[1 - axis]:
            shapes = " and ".join(str(tuple(weight.main.shape)) for weight in weights)
            raise self.error(layer, f"and {safe_repr(other)} are of {shapes}; expected the same"
                             f" number of {('columns', 'rows')[axis]}")
        joined = join_packed([weight.packed() for weight in weights], axis)
        self.put(f"{block}.{name}", joined, None)
        biases = [torch.zeros(len(weight.main), dtype=torch.float32)
                  if weight.bias is None else weight.bias for weight in weights]
        if axis == 1:
            biases = [biases[0].float() + biases[1].float()]
        else:
            biases = [*biases[0].chunk(len(names) - 1), biases[1]]
        for target, bias in zip(names, biases):
            self.put(f"{block}.{target}", None, bias)

    def put(self, layer: str, weight: torch.Tensor | None, bias: torch.Tensor | None):
        """Puts a weight and a bias into `tensors`; None where there is none."""
        for part, tensor in (("weight", weight), ("bias", bias)):
            name = f"{layer}.{part}"
            if tensor is None:
                continue
            if name in self.tensors:
                raise self.error(layer, f"is in the file twice: {safe_repr(name)} is there too")
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
                self.put(f"{block}.{target}", rows, None)


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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


QUANTIZER = Quantizer(
    name="Nunchaku", methods={"nunchaku_lite": "Nunchaku", "svdquant": "Nunchaku"},
    is_in=lambda names, metadata, type_of: has_nunchaku_weights(names), join=_join)
