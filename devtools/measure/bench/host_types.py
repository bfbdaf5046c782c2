"""The case of packing to ComfyUI's own types, compared with ComfyUI's own conversion."""
import functools

from devtools.measure.bench.timing import device, side_by_side

import comfy.quant_ops  # noqa: F401  registers the layouts
import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from featherweight.ops.quantize.row_types import ROW_TYPES, pack_to_type
from featherweight.ops.quantize.second_moments import SecondMoments

# the class of ComfyUI's own conversion, and how it is called
LAYOUTS = {
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}), "nvfp4": ("TensorCoreNVFP4Layout", {})}
TOKENS = 2048  # that the inputs were measured with


def bench_host_types(options):
    """Packing a bfloat16 weight to ComfyUI's own types: by ComfyUI's own conversion (comfy_kitchen,
    which may lack a type), by plain rounding, by search, and with error feedback."""
    shape = options.sizes.weight
    weight = torch.randn(shape, device=device()).bfloat16()
    moments = SecondMoments.zeros(shape[1], device=device())
    moments.add(torch.randn(TOKENS, shape[1], device=device()))
    for name, row_type in ROW_TYPES.items():
        variants = {}
        if name in LAYOUTS:
            layout, arguments = LAYOUTS[name]
            variants["ComfyUI's"] = functools.partial(QuantizedTensor.from_float, weight, layout,
                                                      **arguments)
        pack = functools.partial(pack_to_type, weight, row_type)
        variants |= {"plain": functools.partial(pack, is_plain=True), "searched": pack}
        if options.rounds > 1:
            variants["with feedback"] = functools.partial(pack, moments)
        yield f"{name}, {weight.nbytes / 1e6:.0f} MB", side_by_side(variants, options.rounds)
