"""How many bytes a model's tensors take in each format, by the rules that quantised files follow.

Imports the pack, which `devtools.measure` puts on the path.
"""
import math
import re
from collections.abc import Mapping

from featherweight.loaders.packing.rules import FALLBACKS
from featherweight.ops.format import FORMATS

DENSE = {"BF16": 2, "FP8": 1}  # bytes of a value of a matrix
PACKED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "NF4", "Q3_K", "Q2_K")
COLUMNS = (*DENSE, *PACKED)
RANK = 32  # of the LoRA whose size is counted

Shapes = Mapping[str, tuple[int, ...]]


def bytes_of(shapes: Shapes, column: str, is_encoder: bool = False) -> int:
    """Bytes of a file's tensors.

    FP8 packs every matrix. Quantised files pack the matrices of the blocks, GGUF ones of text encoders the embedding too. What
    else has two dimensions or more takes 16 bits, vectors 16 bits in dense files and 32 in quantised ones.
    """
    return sum(_tensor_bytes(name, shape, column, is_encoder) for name, shape in shapes.items())


def _tensor_bytes(name: str, shape: tuple[int, ...], column: str, is_encoder: bool) -> int:
    values = math.prod(shape)
    if column in DENSE:
        return values * (DENSE[column] if len(shape) == 2 else 2)
    if len(shape) < 2:
        return values * 4
    in_block = re.search(r"\.\d+\.", name)
    if len(shape) > 2 or not (in_block or is_encoder and column != "NF4"):
        return values * 2
    if column == "NF4":
        return values // 2 + values // 64 * 4  # a float32 absmax for each block of 64
    for format_name in (column, FALLBACKS.get(column)):
        if format_name and shape[1] % FORMATS[format_name].block_length == 0:
            return math.prod(FORMATS[format_name].packed_shape(shape))
    return values * 2


def lora_bytes(shapes: Shapes) -> int:
    """A LoRA of rank `RANK` on every matrix of the blocks, in 16 bits."""
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and re.search(r"\.\d+\.", name)]
    return sum(2 * RANK * (rows + columns) for rows, columns in matrices)
