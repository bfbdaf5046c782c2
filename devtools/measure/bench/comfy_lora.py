"""The case of what LoRAs cost on models in ComfyUI's own formats."""
from devtools.measure.bench.models import step_of, with_loras
from devtools.measure.bench.products import LORA_CASES
from devtools.measure.bench.timing import has_bfloat16, side_by_side

import comfy.sd
import torch
from comfy.quant_ops import QUANT_ALGOS

from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.comfyui.quantized_weights import in_parts
from featherweight.loaders.quantizers.comfyui import layer_parts
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.patcher import adopt
from featherweight.ops.quantize.row_types import ROW_TYPES, RowType, pack_to_type
from featherweight.ops.tensor.packed_layout import is_packed


def bench_comfy_lora(options):
    """A step of a Flux in each of ComfyUI's formats without LoRAs and with LoRAs on all layers, in
    bfloat16 where the device has it: by ComfyUI's product (comfy_kitchen), where it knows the
    format, and by this pack's, from the file's weights."""
    sizes, dtype = options.sizes, torch.bfloat16 if has_bfloat16() else torch.float32
    double_blocks, single_blocks = options.blocks or sizes.model_blocks
    shapes = flux_shapes(sizes.hidden, double_blocks, single_blocks, sizes.context)
    for name, row_type in ROW_TYPES.items():
        weights = random_weights(shapes, row_type)
        states = {"exact": weights}
        if format_of(weights) in QUANT_ALGOS:
            states["ComfyUI"] = in_parts(weights, ())
        for who, state in states.items():
            model = adopt(comfy.sd.load_diffusion_model_state_dict(
                state, model_options={"custom_operations": operations_for(state)}))
            model.set_model_compute_dtype(dtype)
            models = {"no LoRA": model}
            for title, (count, rank) in LORA_CASES.items():
                models[title] = with_loras(model, shapes, count, rank)
            steps = {title: step_of(patcher, sizes.model_tokens, sizes.context)
                     for title, patcher in models.items()}
            yield (f"{name}, {who}, {double_blocks} + {single_blocks} blocks,"
                   f" {str(dtype).removeprefix('torch.')}, {sizes.model_tokens} tokens",
                   side_by_side(steps, options.rounds))


def random_weights(shapes: dict[str, tuple], row_type: RowType) -> dict[str, torch.Tensor]:
    """A state dict of random weights, those of blocks packed to a type where it takes their shape,
    as in published files. Those of one shape share their memory."""
    made, weights = {}, {}
    for name, shape in shapes.items():
        is_of_type = "_blocks." in name and row_type.takes(shape)
        if (shape, is_of_type) not in made:
            values = torch.randn(shape) / shape[-1]**0.5
            made[shape, is_of_type] = (
                pack_to_type(values, row_type, is_plain=True) if is_of_type else values)
        weights[name] = made[shape, is_of_type]
    return weights


def format_of(weights: dict[str, torch.Tensor]) -> str:
    """ComfyUI's name of the format of a model's packed weights."""
    return next(layer_parts(weight)[0]["format"] for weight in weights.values()
                if is_packed(weight))
