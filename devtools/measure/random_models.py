"""Flux models of random weights in any format, with LoRAs, and what runs a step of them."""
import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from devtools.measure.timing import device
from devtools.measure.weights import random_weight, takes_shape

import comfy.model_management
import comfy.sd
import torch
from safetensors.torch import save_file

from devtools.files.gguf_files import write_random_gguf
from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.comfyui.comfy_quant_weights import in_parts
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.low_rank import LowRank, Slice
from featherweight.ops.packing.pack_types import ROW_TYPES
from featherweight.ops.patcher import adopt

LORA_CASES = {"2 of rank 16": (2, 16), "4 of rank 32": (4, 32)}  # number and rank of LoRAs
Shapes = dict[str, tuple]


def shapes_for(options, blocks: tuple[int, int] | None = None) -> Shapes:
    """Shapes of a Flux of the options' sizes, real layer sizes and few blocks."""
    sizes = options.sizes
    double_blocks, single_blocks = options.blocks or blocks or sizes.model_blocks
    return flux_shapes(sizes.hidden, double_blocks, single_blocks, sizes.context)


def title_for(options, dtype: torch.dtype) -> str:
    double_blocks, single_blocks = options.blocks or options.sizes.model_blocks
    return (f"{double_blocks} + {single_blocks} blocks, {str(dtype).removeprefix('torch.')},"
            f" {options.sizes.model_tokens} tokens")


def random_weights(shapes: Shapes, name: str) -> dict[str, torch.Tensor]:
    """Returns a state dict.

    Args:
        shapes: of the model's weights. Matrices that the format takes are packed, in ComfyUI's
            types those of blocks, as in published files; others are float32, scales one, biases
            zero.
        name: of a format or of a type of ComfyUI's.
    """
    weights, packed = {}, {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            weights[key] = torch.full(shape, float(key.endswith(".scale")))
        elif not takes_shape(name, shape) or (name in ROW_TYPES and "_blocks." not in key):
            weights[key] = torch.randn(shape) / shape[1] ** 0.5
        else:
            if shape not in packed:
                packed[shape] = random_weight(name, shape)
            weights[key] = packed[shape].clone()
    return weights


def packed_model(weights: dict):
    """Returns ComfyUI's patcher of a state dict with packed weights."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        weights, model_options={"custom_operations": operations_for(weights)})
    assert patcher is not None
    return adopt(patcher)


@contextlib.contextmanager
def flux_file(shapes: Shapes, name: str) -> Iterator[str]:
    """Gives the path of a file of a random Flux, in a type of ggml's or of ComfyUI's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"flux.{'safetensors' if name in ROW_TYPES else 'gguf'}"
        if name in ROW_TYPES:
            save_file(in_parts(random_weights(shapes, name), ()), path)
        else:
            write_random_gguf(path, shapes, name)
        yield str(path)


def step_of(patcher, tokens: int, context: int) -> Callable[[], None]:
    """Returns a function that runs one step at `tokens` of picture, a multiple of 16, and 8 of
    text.

    Args:
        context: width of the text conditioning. What is run before the step loads the model, which
            is not timed.
    """
    latent, text = randn(1, 16, 32, tokens // 8), randn(1, 8, context)
    time_step = torch.tensor([0.5], device=device())
    others = {"y": torch.zeros(1, 768, device=device()),
              "guidance": torch.tensor([3.5], device=device())}

    def run():
        with torch.no_grad():
            patcher.model.apply_model(latent, time_step, c_crossattn=text, **others)

    run.prepare = lambda: comfy.model_management.load_models_gpu([patcher])
    return run


def prediction(patcher, size: int = 32) -> torch.Tensor:
    """Returns what a step adds to a latent of `size` by `size`, which is a quarter as many
    tokens."""
    generator = torch.Generator().manual_seed(0)
    latent, context = (torch.randn(shape, generator=generator).to(device())
                       for shape in ((1, 16, size, size), (1, 32, 1024)))
    comfy.model_management.load_models_gpu([patcher])
    with torch.no_grad():
        time_step = torch.tensor([0.5], device=device())
        return patcher.model.apply_model(latent, time_step, c_crossattn=context) - latent


def with_loras(model, shapes: Shapes, count: int, rank: int):
    """Returns a model with LoRAs on all its matrices, one of each seed."""
    for seed in range(count):
        model, _ = comfy.sd.load_lora_for_models(model, None, lora_file(shapes, rank, seed), 1.0,
                                                 0.0)
    assert model is not None
    return model


def lora_file(shapes: Shapes, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Returns a LoRA in BFL's key names on every matrix of a model."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            for part, size in (("up", (shape[0], rank)), ("down", (rank, shape[1]))):
                values = torch.randn(size, generator=generator) * 0.01
                tensors[f"{layer}.lora_{part}.weight"] = values
    return tensors


def steps_with_loras(model, shapes: Shapes, tokens: int, context: int) -> dict[str, Callable]:
    """Returns the steps of a model without LoRAs and with those of LORA_CASES."""
    models = {"no LoRA": model}
    models |= {title: with_loras(model, shapes, *case) for title, case in LORA_CASES.items()}
    return {title: step_of(patcher, tokens, context) for title, patcher in models.items()}


def random_branch(rows: int, columns: int, rank: int, dtype: torch.dtype) -> LowRank:
    """Returns LoRAs of a rank on a whole weight."""
    return LowRank(randn(rank, columns, dtype=dtype), (randn(rows, rank, dtype=dtype),),
                   (Slice(0, rows, 0, rank),))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device())


def packs(peer: Path | None) -> dict[str, Callable]:
    """Returns the name of each pack to compare -> its function that loads a GGUF model."""
    return {"Featherweight": load_diffusion_model} | (
        {peer.name: peer_loader(peer)} if peer else {})


def peer_loader(folder: Path) -> Callable:
    """Returns the function behind `UnetLoaderGGUF` of another installed pack, loaded into this
    host."""
    import folder_paths

    import nodes  # which takes seconds

    asyncio.run(nodes.load_custom_node(str(folder)))
    node = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]

    def load(path: str):
        folder_paths.add_model_folder_path("diffusion_models", str(Path(path).parent),
                                           is_default=True)
        return getattr(node(), node.FUNCTION)(unet_name=Path(path).name)[0]

    return load
