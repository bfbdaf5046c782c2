"""The case of a model computed exactly, fast and with dense weights, without and with LoRAs."""
import tempfile
from pathlib import Path

from devtools.measure.bench.comfy_lora import random_weights
from devtools.measure.bench.models import with_loras
from devtools.measure.bench.timing import median_and_range

import comfy.model_management
import torch
from safetensors.torch import save_file

from devtools.files.gguf_files import write_random_gguf
from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.comfyui.quantized_weights import in_parts
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.speed.measurement import measure_speed
from featherweight.ops.quantize.row_types import ROW_TYPES

TYPES = ("Q4_K", "int8_convrot", "float8_e4m3fn", "mxfp8", "nvfp4")
LORAS, RANK = 2, 16
ROW_SECONDS = 1.0  # of steps of each way
PATCHES_ACROSS = 16  # of the latents' width, in patches of 2 values


def bench_ways(options):
    """A step of a Flux in Q4_K and in ComfyUI's formats as Measure Speed measures it: dense, exact
    and fast, without LoRAs and with two of rank 16 on all layers."""
    sizes = options.sizes
    double_blocks, single_blocks = options.blocks or sizes.model_blocks
    shapes = flux_shapes(sizes.hidden, double_blocks, single_blocks, sizes.context)
    height = max(1, sizes.model_tokens // PATCHES_ACROSS)
    latent = {"samples": torch.zeros(1, 16, 2 * height, 2 * PATCHES_ACROSS)}
    for name in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            model = load_diffusion_model(_write(Path(folder), shapes, name), compute="automatic")
            model = with_loras(model, shapes, LORAS, RANK)
            measurement = measure_speed(model, latent=latent, row_seconds=ROW_SECONDS)
        rows = sorted(measurement.rows, key=lambda row: row.way != "dense")
        yield f"{name}, {sizes.model_tokens} tokens", {
            f"{row.way}{f', {LORAS} LoRAs' if row.has_loras else ''}":
            {**median_and_range(row.seconds), "by": row.kernels} for row in rows if row.seconds}
        del model
        comfy.model_management.unload_all_models()


def _write(folder: Path, shapes: dict[str, tuple], name: str) -> str:
    if name not in ROW_TYPES:
        path = folder / "flux.gguf"
        write_random_gguf(path, shapes, name)
    else:
        path = folder / "flux.safetensors"
        weights = in_parts(random_weights(shapes, ROW_TYPES[name]), ())
        save_file({key: tensor.clone() for key, tensor in weights.items()}, path)
    return str(path)
