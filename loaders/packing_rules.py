"""Decides by names and shapes which tensors may be packed, and which types fit their rows.

The patterns of what stays exact follow the field's converters (ComfyUI-GGUF's `tools/convert.py`
and `lcpp.patch`), so that files made here keep the same parts: what maps a model's inputs and
outputs, its tables, and small tensors. In ComfyUI's own types some more stay exact, as in files
that convert_to_quant 1.3.4 makes (`constants.py`), and only what ComfyUI reads packed is packed.
"""
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..ops.packing.pack_types import ROW_TYPES, pack_type

Shapes = Mapping[str, tuple[int, ...]]

HALVES = ("F16", "BF16")
SMALL = 1024  # values of a tensor up to which packing gains nothing
NUMBERED = re.compile(r"(^|\.)\d+\.")
BLOCK = re.compile(r"\w*blocks\.(\d+)\.")
LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")  # of a text encoder
# Matrices in blocks by whose columns ComfyUI detects a model: they are not stored two in a byte.
COLUMNS_DETECTED = re.compile(r"blocks\.0\.(attn2\.to_k|norm1\.linear)\.weight$")
# Text encoders of which ComfyUI reads no packed layers, but takes the codes for weights: CLIP, T5
# and the like, except for T5-XXL, which it tells by this tensor (`t5xxl_detect` of its `sd.py`).
UNREAD_ENCODERS = re.compile(r"(text_model|encoder\.(block|layer)|model\.encoder)\.")
T5_XXL = re.compile(
    r"encoder\.block\.23\.layer\.1\.DenseReluDense\.wi(?P<gated>_1)?\.weight")
T5_XXL_ROWS = 10240
# Tables and gates that are added to or multiplied with activations: float32 in the field's files.
PRECISE = re.compile(r"(^|\.)(modulation|scale_shift_table|emb_pos|ff_i\.gate\.weight)$")
# What stays exact in a model of an unknown family: what is before, between and after its blocks.
KEEP_EXACT = (
    r"embed|^\w*_in\.|^proj_(in|out)\.|^final|^head\.|^adaln_single\.|relative_attention_bias"
)
# Of such a model (Krea 2, Boogu, Ideogram 4, MiniMax-H3) in ComfyUI's own formats.
KEEP_EXACT_IN_ROWS = (
    r"^(first|last|tmlp|tproj|txtmlp|txtfusion)\.|^norm_out\.|adaln_proj|llm_cond_proj|token_refiner"
    r"|patch_proj|condition_proj|image_index|norm\d\.linear\."
)
# Text encoders that see: their first and last layers are not packed to row types.
SEEING = re.compile(r"(^|\.)visual\.|\.linear_attn\.")


@dataclass(frozen=True)
class PackingRules:
    """Rules for a family (`families.py`): models whose tensors have the same names.

    Names are the host's without prefix; patterns are searched in them.

    Attributes:
        name: of the family.
        architecture: `general.architecture` of its GGUF files, as ComfyUI-GGUF and
            stable-diffusion.cpp have it; "" where they have none.
        signature: pattern of a name that only this family has.
        exact: pattern of names that are never packed.
        convolutions: the type of weights of three and more dimensions, None for the source's.
        embedding: pattern of lookup tables that may be packed, None for no tables.
        exact_in_rows: pattern of further names that are not packed to row types.
        outer_blocks: how many of the first and last blocks are not packed to row types, unless
            these are all.
    """

    name: str
    architecture: str
    signature: str
    exact: str
    convolutions: str | None = None
    embedding: str | None = None
    exact_in_rows: str | None = None
    outer_blocks: tuple[int, int] = (0, 0)

    def may_be_packed(self, name: str, shape: tuple[int, ...], embeddings: bool = True) -> bool:
        """Returns whether a tensor is a matrix of a block, or a lookup table that may be packed.

        embeddings: whether lookup tables may.
        """
        if (
            len(shape) != 2
            or math.prod(shape) <= SMALL
            or name.endswith("bias")
            or PRECISE.search(name)
        ):
            return False
        if self.embedding and re.search(self.embedding, name):
            return embeddings
        return bool(NUMBERED.search(name)) and not re.search(self.exact, name)

    def row_names(self, shapes: Shapes, type_name: str) -> list[str]:
        """Returns the names of the matrices that may be packed to a type of `ROW_TYPES`.

        Those are weights of linear layers in blocks. ComfyUI reads no tables in most of its types,
        and of some text encoders nothing.
        """
        is_t5_xxl = any(match and (not match["gated"] or shape[0] == T5_XXL_ROWS) for match, shape
                        in ((T5_XXL.fullmatch(name), shape) for name, shape in shapes.items()))
        if self.embedding and not is_t5_xxl and any(map(UNREAD_ENCODERS.match, shapes)):
            return []
        is_halved = ROW_TYPES[type_name].family.example.codes.bits == 4
        block, (first, last) = BLOCK, self.outer_blocks
        if self.embedding and any(map(SEEING.search, shapes)):
            block, (first, last) = LAYER, (1, 1)
        numbers = {name: int(match[1]) for name in shapes if (match := block.match(name))}
        count = max(numbers.values(), default=0) + 1
        inner = range(first, count - last) if count > first + last else range(count)
        return [
            name for name, shape in shapes.items()
            if name.endswith(".weight") and self.may_be_packed(name, shape, embeddings=False)
            and not (self.exact_in_rows and re.search(self.exact_in_rows, name))
            and not (is_halved and COLUMNS_DETECTED.search(name))
            and (name not in numbers or numbers[name] in inner)
        ]

    def exact_type(self, name: str, shape: tuple[int, ...], half: str) -> str:
        """Returns "F32", or for a larger matrix `half`, the 16-bit type of the source."""
        if len(shape) < 2 or math.prod(shape) <= SMALL or PRECISE.search(name):
            return "F32"
        if len(shape) > 2 and self.convolutions:
            return self.convolutions
        return half


GENERAL_RULES = PackingRules("general", "", "", KEEP_EXACT, exact_in_rows=KEEP_EXACT_IN_ROWS)


def half_type(dtype: torch.dtype) -> str:
    """Returns the 16-bit type for a tensor that is not packed, as the field's converters choose it.

    BF16 for bfloat16 and for fp8, whose values it holds. F16 for float16 and float32: its rounding
    error is an eighth of BF16's, and the few tensors beyond its range take a wider type.
    """
    return "F16" if dtype in (torch.float16, torch.float32) else "BF16"


def with_fallback(type_name: str, shape: tuple[int, ...], half: str = "F16") -> str:
    """Returns a type, or its fallback where its blocks do not divide the rows of a tensor, or the
    16-bit type `half` where those of the fallback do not either."""
    for name in (type_name, pack_type(type_name).fallback):
        if name and pack_type(name).takes(shape):
            return name
    return half
