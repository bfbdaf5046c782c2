"""What the loaders' inputs `compute` and `host formats` mean together.

`compute` says how packed layers multiply, and with `BY_COMPUTE` in the other input also who
computes layers in ComfyUI's own formats. Workflows and prompts from before 0.2.2 have one of
`HOST_FORMATS` there, or nothing, and keep their meaning.
"""
from typing import NamedTuple

from ..comfyui.who_computes import AS_COMFYUI, AUTOMATIC, EXACT, HOST_FORMATS

EXACTLY, FAST = "exact", "fast"
INT8, FLOAT32 = "int8", "float32"  # offered before 0.2.2; float32 still is the only way to it
COMPUTE_CHOICES = (AUTOMATIC, EXACTLY, FAST, INT8, FLOAT32)  # options of the input `compute`
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
    AUTOMATIC: Computing("exact", AUTOMATIC),
    EXACTLY: Computing("exact", EXACT),
    FAST: Computing("int8", AS_COMFYUI),
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
