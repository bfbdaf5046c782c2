"""ComfyUI's own quantised layers by its own kernels, beside dense bfloat16 and ours."""
import json

import devtools.measure  # noqa: F401  the host
from devtools.measure.bench.timing import device, has_bfloat16, side_by_side

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from featherweight.loaders.quantizers.comfyui import pack_parts
from featherweight.ops.layers import product
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.layers.low_rank import LowRank, Slice
from featherweight.ops.patches.layer_patches import LayerPatches

# title -> (format, what its quantiser gets, what its `comfy_quant` says)
LAYERS = {
    "int8_convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True}, {"convrot": True}),
    "fp8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "nvfp4": ("nvfp4", {}, {}),
}
RANKS = 2 * 16  # two LoRAs


def bench_host_layers(options):
    """A layer in each of ComfyUI's formats, without LoRAs and with two of rank 16: dense, by its
    own kernels, and exact by ours."""
    rows, columns = options.sizes.weight
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    values = torch.randn(rows, columns, device=device(), dtype=dtype)
    down, up = (torch.randn(shape, dtype=dtype, device=device())
                for shape in ((RANKS, columns), (rows, RANKS)))
    branch = LowRank(down, (up,), (Slice(0, rows, 0, RANKS),))
    for title, (format_name, writing, settings) in LAYERS.items():
        try:
            hosts, exact = _layers(values, format_name, writing, settings)
        except Exception as error:  # a device, or a ComfyUI, that lacks the format
            yield title, {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        for tokens in options.sizes.lora_tokens:
            input = torch.randn(tokens, columns, dtype=dtype, device=device())
            yield f"{title}, {rows} x {columns}, M = {tokens}", side_by_side({
                "dense": lambda input=input: torch.nn.functional.linear(input, values),
                "ComfyUI's": lambda input=input: _run(hosts, input, None),
                "ComfyUI's, 2 LoRAs": lambda input=input: _run(hosts, input, branch),
                "exact": lambda input=input: product.linear(input, exact),
                "exact, 2 LoRAs": lambda input=input: product.linear(input, exact,
                                                                     low_rank=branch),
            }, options.rounds)


def _layers(values: torch.Tensor, format_name: str, writing: dict, settings: dict):
    """(a layer whose product is ComfyUI's, the same weight packed for ours)"""
    layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
    quantised = QuantizedTensor.from_float(values, layout, **writing)
    parts = {name: part.cpu() for name, part in quantised.state_dict("weight").items()}
    layer = packed_operations(mixed=True).Linear(values.shape[1], len(values), bias=False,
                                                 dtype=values.dtype)
    mark = {"format": format_name} | settings
    stored = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    layer.load_state_dict(dict(parts) | {"comfy_quant": stored})
    return layer.to(values.device), pack_parts(mark, parts).to(values.device)


@torch.no_grad()
def _run(layer, input: torch.Tensor, branch: LowRank | None) -> torch.Tensor:
    layer.lora = None if branch is None else LayerPatches("weight", branch)
    return layer(input)
