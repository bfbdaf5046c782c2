"""The case of what LoRAs cost on layers in ComfyUI's own formats."""
from devtools.measure.bench.products import LORA_CASES
from devtools.measure.bench.timing import device, has_bfloat16, side_by_side

import torch
from comfy.quant_ops import QUANT_ALGOS

from featherweight.loaders.quantizers.comfyui import layer_parts
from featherweight.loaders.quantizers.comfyui_marks import mark_of
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.layers.low_rank import LowRank, Slice
from featherweight.ops.patches.layer_patches import LayerPatches
from featherweight.ops.quantize.row_types import ROW_TYPES, pack_to_type


def bench_comfy_lora(options):
    """A layer in each of ComfyUI's formats, without LoRAs and with LoRAs on it, in bfloat16 where
    the device has it: computed by ComfyUI (comfy_kitchen), where that knows the format, and by this
    pack from the file's weights."""
    shape, tokens = options.sizes.weight, options.sizes.model_tokens
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    weight = torch.randn(shape) / shape[1] ** 0.5
    input = torch.randn(tokens, shape[1], dtype=dtype, device=device())
    for name, row_type in ROW_TYPES.items():
        packed = pack_to_type(weight, row_type, is_plain=True)
        settings, parts = layer_parts(packed)
        layers = {"exact": {"weight": packed}}
        if settings["format"] in QUANT_ALGOS:
            layers["ComfyUI"] = {**parts, "comfy_quant": mark_of(settings)}
        for who, state in layers.items():
            layer = packed_operations(mixed=True).Linear(*reversed(shape), dtype=dtype)
            layer.load_state_dict(state | {"bias": torch.randn(shape[0])})
            layer.to(device())
            variants = {"no LoRA": step_of(layer, input, 0, 0)}
            variants |= {title: step_of(layer, input, *case) for title, case in LORA_CASES.items()}
            yield (f"{name}, {who}, {shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')},"
                   f" M = {tokens}", side_by_side(variants, options.rounds))


def step_of(layer, input: torch.Tensor, count: int, rank: int):
    """A function that runs a layer with `count` LoRAs of a rank; without any with 0."""
    (rows, columns), ranks, patches = layer.weight.shape, count * rank, None
    if ranks:
        down, up = (torch.randn(size, dtype=input.dtype, device=input.device)
                    for size in ((ranks, columns), (rows, ranks)))
        patches = LayerPatches("weight", LowRank(down, (up,), (Slice(0, rows, 0, ranks),)))

    def run():
        layer.lora = patches
        with torch.no_grad():
            layer(input)

    return run
