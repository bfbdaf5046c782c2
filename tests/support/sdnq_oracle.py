"""Writes files with a version of SDNQ, in a process of its own: python sdnq_oracle.py FOLDER.

Reads from the standard input a JSON list of cases: the arguments of `sdnq_post_load_quant`, and
`layers`, name -> [class, arguments]. Writes for case i `FOLDER/i/model.safetensors` with the
`config.json`, and `FOLDER/i/expected.safetensors` with the values of the weights, in float32.
"""
import enum
import json
import os
import sys
from pathlib import Path

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"

import torch
from safetensors.torch import save_file


def values_of(layer) -> torch.Tensor:
    """Returns the weight of a layer as SDNQ dequantises it, in the shape of the dense layer."""
    dequantizer = layer.sdnq_dequantizer
    # by place in the first versions, whose parts are fewer
    parts = {name: getattr(layer, name, None)
             for name in ("weight", "scale", "zero_point", "svd_up", "svd_down")}
    for name in ("scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2"):
        if getattr(layer, name, None) is not None:
            parts[name] = getattr(layer, name)
    is_matmul = getattr(dequantizer, "use_quantized_matmul", False)
    try:
        values = dequantizer(**parts, skip_compile=True, skip_quantized_matmul=is_matmul)
    except TypeError:
        values = dequantizer(*parts.values(), skip_quantized_matmul=is_matmul)
    shape = dequantizer.original_shape
    if values.shape != shape and values.t().shape == shape:
        values = values.t()
    return values.reshape(shape).float().contiguous()


def main(folder: Path):
    from sdnq import sdnq_post_load_quant

    for number, case in enumerate(json.load(sys.stdin)):
        torch.manual_seed(number)
        dtype = getattr(torch, case.pop("torch_dtype", "float32"))
        layers = torch.nn.ModuleDict({
            name: getattr(torch.nn, class_name)(*arguments, dtype=dtype)
            for name, (class_name, arguments) in case.pop("layers").items()})
        dense = {name: layer.weight.detach().float().clone() for name, layer in layers.items()}
        model = sdnq_post_load_quant(layers, torch_dtype=dtype, add_skip_keys=False, **case)
        path = folder / str(number)
        path.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                  path / "model.safetensors")
        expected = {f"{name}.weight": values_of(layer) for name, layer in model.items()
                    if hasattr(layer, "sdnq_dequantizer")}
        for name, values in expected.items():
            weight = dense[name.removesuffix(".weight")]
            assert values.shape == weight.shape, (name, values.shape, weight.shape)
        save_file(expected, path / "expected.safetensors")
        config = model.quantization_config.to_dict()
        (path / "config.json").write_text(json.dumps(
            {"quantization_config": config},
            default=lambda value: value.value if isinstance(value, enum.Enum) else str(value)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
