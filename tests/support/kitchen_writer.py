"""Quantises weights with the comfy-kitchen on the path: `kitchen_writer.py CASES OUT`.

Runs in a process of its own, since one process has one comfy-kitchen. CASES, OUT: of `torch.save`.
"""
import dataclasses
import sys

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class


def quantised(weight: torch.Tensor, layout: str, options: dict):
    """(parts of a file, values in float32); options: with "qdata", the weight's own tensors."""
    if "qdata" in options:
        tensors = dict(options)
        params = get_layout_class(layout).Params(
            orig_dtype=torch.float32, orig_shape=tuple(weight.shape), scale=tensors["scale"],
            zeros=tensors["zeros"])
        packed = QuantizedTensor(tensors["qdata"], layout, params)
        return packed.state_dict("weight"), packed.dequantize()
    packed = QuantizedTensor.from_float(weight, layout, **options)
    params = dataclasses.replace(packed._params, orig_dtype=torch.float32)
    return packed.state_dict("weight"), QuantizedTensor(packed._qdata, layout, params).dequantize()


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: quantised(*case) for name, case in cases.items()}, sys.argv[2])
