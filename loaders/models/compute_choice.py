"""What the loaders' inputs `compute` and `host formats` mean together.

`compute` says how packed layers multiply, and with `BY_COMPUTE` in the other input also who
computes layers in ComfyUI's own formats. Workflows and prompts from before 0.2.2 have one of
`HOST_FORMATS` there, or nothing, and keep their meaning.
"""
from typing import NamedTuple

from comfy.model_patcher import ModelPatcher

from ...ops.layers import kitchen_products
from ...ops.tensor.packed_layout import is_packed
from ..byte_sizes import size_text
from ..comfyui.who_computes import (
    AUTOMATIC,
    EXACT,
    HOST_FORMATS,
    host_multiplies,
)
from ..devices import total_memory
from ..packing.planning.fit import FAST_FORMAT, FAST_TYPE
from ..packing_rules import bytes_in_file
from ..quantizers.comfyui import row_type_of

EXACTLY, FAST = "exact", "fast"
INT8, FLOAT32 = "int8", "float32"  # before 0.2.2; int8 is FAST, float32 the only way to it
COMPUTE_CHOICES = (AUTOMATIC, EXACTLY, FAST, INT8, FLOAT32)  # options of the input `compute`
CHOICES_OF_SIDE_MODELS = COMPUTE_CHOICES[:3]  # of text encoders, ControlNets and the like
BY_COMPUTE = "by compute"
HOST_FORMATS_CHOICES = (BY_COMPUTE, *HOST_FORMATS)  # options of the input `host formats`


class Computing(NamedTuple):
    """How a model computes.

    Attributes:
        arithmetic: one of `compute_dtype.COMPUTE`.
        host_formats: one of `who_computes.HOST_FORMATS`.
    """

    arithmetic: str
    host_formats: str


# choice of `compute` -> what it means where `host formats` is BY_COMPUTE
MEANINGS = {
    AUTOMATIC: Computing("automatic", AUTOMATIC),
    EXACTLY: Computing("exact", EXACT),
    FAST: Computing("int8", AUTOMATIC),
    INT8: Computing("int8", AUTOMATIC),
    FLOAT32: Computing("float32", EXACT),
}


def computing(compute: str, host_formats: str) -> Computing:
    """Returns how a model computes, by the two inputs of its loader.

    Args:
        compute: one of `COMPUTE_CHOICES`.
        host_formats: one of `HOST_FORMATS_CHOICES`.
    """
    meaning = MEANINGS[compute]
    return meaning if host_formats == BY_COMPUTE else meaning._replace(host_formats=host_formats)


def faster_type_text(patcher: ModelPatcher, compute: str) -> str | None:
    """Returns a sentence on a type of `pack to` that is faster than "fast" is; None for none.

    Args:
        patcher: the host's, of a model that was loaded with `compute`.
        compute: one of `COMPUTE_CHOICES`.
    """
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    if (compute != FAST or not host_multiplies(FAST_FORMAT, device)
            or kitchen_products.why_not_fast(device, dtype)):
        return None
    weights = [weight for weight in patcher.model.diffusion_model.parameters()
               if is_packed(weight) and weight.ndim == 2 and row_type_of(weight) is None]
    size = sum(bytes_in_file(FAST_TYPE, tuple(weight.shape)) for weight in weights)
    if not weights or size > total_memory(device):
        return None
    return (f"With {FAST_TYPE} at `pack to` ({size_text(size)}) ComfyUI's kernels compute it,"
            " which is faster than fast is with this file.")
