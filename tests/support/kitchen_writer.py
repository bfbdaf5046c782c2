"""Quantises weights with the comfy-kitchen on the path: `kitchen_writer.py CASES OUT`.

Runs in a process of its own, since one process has one comfy-kitchen. CASES, OUT: of `torch.save`.
"""
import dataclasses
import sys

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class


def quantised(weight: torch.Tensor, layout: str, options: dict):
    """(parts of a file, values in float32); options: with "qdata", what the layout says of the
    weight's own codes."""
    if "qdata" in options:
        settings = dict(options)
        codes = settings.pop("qdata")
        params = get_layout_class(layout).Params(
            orig_dtype=torch.float32, orig_shape=tuple(weight.shape), **settings)
        packed = QuantizedTensor(codes, layout, params)
        return packed.state_dict("weight"), packed.dequantize()
    packed = QuantizedTensor.from_float(weight, layout, **options)
    params = dataclasses.replace(packed._params, orig_dtype=torch.float32)
    return packed.state_dict("weight"), QuantizedTensor(packed._qdata, layout, params).dequantize()


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: quantised(*case) for name, case in cases.items()}, sys.argv[2])
