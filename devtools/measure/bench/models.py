"""Cases on Flux models of real layer sizes and few blocks: a step, its LoRAs, in each of ComfyUI's
formats."""
import collections
import math
from pathlib import Path

from devtools.measure.random_models import (
    flux_file,
    packed_model,
    packs,
    random_weights,
    shapes_for,
    step_of,
    steps_with_loras,
    title_for,
)
from devtools.measure.timing import fast_dtype, side_by_side

import comfy.model_management
import comfy.sd
import torch
from comfy.quant_ops import QUANT_ALGOS
from safetensors.torch import save_file

from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.comfyui.comfy_quant_weights import in_parts
from featherweight.loaders.quantizers.comfy_quant import layer_parts
from featherweight.ops.layers import product
from featherweight.ops.packing.pack_types import ROW_TYPES
from featherweight.ops.tensor.packed_layout import is_packed


def bench_model(options):
    """A step of a Flux with packed weights against one with the same weights dense, both computing
    in bfloat16 (on a CPU without it in float32), with the tokens of a picture."""
    sizes, dtype, shapes = options.sizes, fast_dtype(), shapes_for(options)
    weights = {name: random_weights(shapes, name) for name in options.formats}
    dense = {name: product.dequantize(weight, dtype) if is_packed(weight) else weight
             for name, weight in weights[options.formats[0]].items()}
    unpacked = comfy.sd.load_diffusion_model_state_dict(dense, model_options={"dtype": dtype})
    assert unpacked is not None
    models = {"dense": unpacked} | {name: packed_model(state) for name, state in weights.items()}
    for model in models.values():
        model.set_model_compute_dtype(dtype)
    yield title_for(options, dtype), side_by_side(
        {name: step_of(model, sizes.model_tokens, sizes.context)
         for name, model in models.items()}, options.rounds)


def bench_step(options):
    """A step of a Flux of one double and one single block, real layer sizes, 256 tokens (on a GPU
    4,096), Q4_K, with and without LoRAs; with --peer also another pack's."""
    sizes = options.sizes
    shapes = flux_shapes(sizes.hidden, 1, 1, sizes.context)
    with flux_file(shapes, "Q4_K") as path:
        for pack, load in packs(options.peer).items():
            model = load(path)
            dtype = model.model.manual_cast_dtype or model.model.get_dtype()
            yield f"{pack}, {str(dtype).removeprefix('torch.')}", side_by_side(
                steps_with_loras(model, shapes, sizes.step_tokens, sizes.context), options.rounds)


def bench_comfy_lora(options):
    """A step of a Flux in each of ComfyUI's formats without LoRAs and with LoRAs on all layers, in
    bfloat16 where the device has it: by this pack's product, from the file's weights, and by
    ComfyUI's (comfy_kitchen), where it knows the format. The formats are measured in turn: one
    after the other they differed by what else the machine did."""
    sizes, dtype, shapes = options.sizes, fast_dtype(), shapes_for(options)
    for who in ("exact", "ComfyUI"):
        variants = {}
        for name in ROW_TYPES:
            weights = random_weights(shapes, name)
            packed = next(filter(is_packed, weights.values()))
            if who == "ComfyUI":
                if layer_parts(packed)[0]["format"] not in QUANT_ALGOS:
                    continue
                weights = in_parts(weights, ())
            model = packed_model(weights)
            model.set_model_compute_dtype(dtype)
            steps = steps_with_loras(model, shapes, sizes.model_tokens, sizes.context)
            variants |= {f"{name}: {title}": step for title, step in steps.items()}
        rows = collections.defaultdict(dict)
        for variant, times in side_by_side(variants, options.rounds).items():
            name, _, title = variant.partition(": ")
            rows[name][title] = times
        for name, row in rows.items():
            yield f"{name}, {who}, {title_for(options, dtype)}", row


def write_dense_flux(path: Path, shapes: dict[str, tuple]):
    """Writes a Flux of random weights in bfloat16."""
    save_file({name: torch.randn(shape, dtype=torch.bfloat16) / math.sqrt(shape[-1])
               for name, shape in shapes.items()}, path)
