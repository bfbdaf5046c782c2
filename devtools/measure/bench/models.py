"""Cases on Flux models of real layer sizes and few blocks: a step, its LoRAs, its error."""
import tempfile
from pathlib import Path

from devtools.measure.bench.products import LORA_CASES
from devtools.measure.bench.timing import device, has_bfloat16, side_by_side
from devtools.measure.weights import divides_rows, packed_weight, random_weight, snr

import comfy.model_management
import comfy.sd
import torch

from devtools.files.gguf_files import write_gguf, write_random_gguf
from devtools.files.tiny_models import flux, flux_shapes
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.layers import int8, product
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.patcher import adopt
from featherweight.ops.tensor.packed_layout import is_packed, packed_tensors


def bench_model(options):
    """A step of a Flux with packed weights against one with the same weights dense, both computing
    in bfloat16 (on a CPU without it in float32), with the tokens of a picture."""
    sizes = options.sizes
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    double_blocks, single_blocks = options.blocks or sizes.model_blocks
    shapes = flux_shapes(sizes.hidden, double_blocks, single_blocks, sizes.context)
    first, *others = options.formats
    weights = random_weights(shapes, first)
    dense = {
        name: product.dequantize(weight, dtype) if is_packed(weight) else weight
        for name, weight in weights.items()
    }
    models = {
        "dense": comfy.sd.load_diffusion_model_state_dict(dense, model_options={"dtype": dtype})
    }
    models[first] = packed_model(weights)
    models |= {name: packed_model(random_weights(shapes, name)) for name in others}
    for model in models.values():
        model.set_model_compute_dtype(dtype)
    variants = {
        name: step_of(model, sizes.model_tokens, sizes.context) for name, model in models.items()
    }
    yield (
        f"{double_blocks} + {single_blocks} blocks, {str(dtype).removeprefix('torch.')},"
        f" {sizes.model_tokens} tokens",
        side_by_side(variants, options.rounds))


def random_weights(shapes: dict[str, tuple], format_name: str) -> dict:
    """A state dict of packed matrices, where blocks divide the rows. Other matrices are float32,
    scales one, biases zero."""
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.full(shape, float(name.endswith(".scale")))
        elif not divides_rows(format_name, shape[1]):
            weights[name] = torch.randn(shape) / shape[1] ** 0.5
        else:
            weights[name] = random_weight(format_name, shape)
    return weights


def packed_model(weights: dict):
    return adopt(
        comfy.sd.load_diffusion_model_state_dict(
            weights, model_options={"custom_operations": packed_operations()}))


def bench_step(options):
    """A step of a Flux of one double and one single block, real layer sizes, 256 tokens, Q4_K, with
    and without LoRAs."""
    sizes = options.sizes
    shapes = flux_shapes(sizes.hidden, 1, 1, sizes.context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-q4_k.gguf"
        write_random_gguf(path, shapes, "Q4_K")
        for pack, load in packs(options.peer).items():
            models = {"no LoRA": load(str(path))}
            for title, (count, rank) in LORA_CASES.items():
                model = models[title] = with_loras(models["no LoRA"], shapes, count, rank)
            tokens = min(256, sizes.model_tokens)
            variants = {
                title: step_of(model, tokens, sizes.context) for title, model in models.items()
            }
            yield f"{pack}, {computes_in(model)}", side_by_side(variants, options.rounds)


def computes_in(patcher) -> str:
    """The dtype in which ComfyUI runs a model's layers."""
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return str(dtype).removeprefix("torch.")


def step_of(patcher, tokens: int, context: int):
    """A function that runs one step at `tokens` of picture, a multiple of 16, and 8 of text.

    context: width of the text conditioning. What is run before the step loads the model, which is
    not timed.
    """
    latent = torch.randn(1, 16, 32, tokens // 8, device=device())
    time_step, text = (
        torch.tensor([0.5], device=device()),
        torch.randn(1, 8, context, device=device()),
    )
    others = {
        "y": torch.zeros(1, 768, device=device()), "guidance": torch.tensor([3.5], device=device())
    }

    def prepare():
        comfy.model_management.load_models_gpu([patcher])

    def run():
        with torch.no_grad():
            patcher.model.apply_model(latent, time_step, c_crossattn=text, **others)

    run.prepare = prepare
    return run


def packs(peer: Path | None) -> dict:
    """Name of each pack to compare -> its function that loads a GGUF model."""
    return {"Featherweight": load_diffusion_model} | (
        {peer.name: peer_loader(peer)} if peer else {}
    )


def peer_loader(folder: Path):
    """The function behind `UnetLoaderGGUF` of another installed pack, loaded into this host."""
    import asyncio

    import folder_paths

    import nodes

    asyncio.run(nodes.load_custom_node(str(folder)))
    node = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]

    def load(path: str):
        folder_paths.add_model_folder_path("diffusion_models", str(Path(path).parent),
                                           is_default=True)
        return getattr(node(), node.FUNCTION)(unet_name=Path(path).name)[0]

    return load


def bench_peer(options):
    """One layer of a model in each pack, for each GGUF format: dequantising its whole weight,
    Featherweight's into a reused buffer; and running it, with M = 1 row nearly all of the time
    going into dequantising. Takes --peer."""
    sizes = options.sizes
    for name in options.formats if options.peer else ():
        if FORMATS[name].ggml_type is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"flux-{name}.gguf"
            write_random_gguf(path, flux_shapes(sizes.hidden, 1, 1, sizes.context), name)
            models = {pack: load(str(path)) for pack, load in packs(options.peer).items()}
            comfy.model_management.load_models_gpu(list(models.values()))
            layers = {
                pack: model.model.diffusion_model.double_blocks[0].img_mlp[2]
                for pack, model in models.items()
            }
            title = f"{name}, {sizes.hidden} x {4 * sizes.hidden}"
            with torch.no_grad():
                for dtype in (torch.bfloat16, torch.float32):
                    yield f"{title}, to {str(dtype).removeprefix('torch.')}", dequantize_times(
                        *layers.values(), dtype, options)
                for tokens in (1, sizes.model_tokens):
                    rows = torch.randn(tokens, 4 * sizes.hidden, device=device())
                    variants = {
                        pack: lambda rows=rows, layer=layer: layer(rows)
                        for pack, layer in layers.items()
                    }
                    yield f"{title}, M = {tokens}", side_by_side(variants, options.rounds)


def dequantize_times(ours, peers, dtype: torch.dtype, options) -> dict[str, dict]:
    """The whole weight of a layer of each pack in `dtype`; the peer's as its layer gets it while it
    runs."""
    weight, buffer = ours.weight, torch.empty(ours.weight.shape, dtype=dtype, device=device())
    packed_format, tensors = weight.params.format, packed_tensors(weight)
    return side_by_side({
        "Featherweight": lambda: kernels.dequantize_into(packed_format, tensors, buffer),
        options.peer.name: lambda: peers.get_weight(peers.weight, dtype),
    }, options.rounds)


def bench_lora_error(options):
    """Error of a small quantised Flux against the unquantised one, without and with a LoRA on both
    (growth 1: none)."""
    tensors = flux()
    lora = lora_file({name: value.shape for name, value in tensors.items()}, 16, 0)
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "float32": dense_flux(tensors),
            "fp8 (ComfyUI)": dense_flux(tensors, torch.float8_e4m3fn)
        }
        for name in ("Q8_0", "Q5_0", "Q4_0"):
            path = Path(folder) / f"{name}.gguf"
            write_gguf(path, tensors, lambda key, values, name=name: name
                       if values.ndim == 2 else "F32")
            models[name] = load_diffusion_model(str(path))
        patched = {
            name: comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
            for name, model in models.items()
        }
        pictures = {name: (prediction(models[name]), prediction(patched[name])) for name in models}
    exact = pictures.pop("float32")
    for name, found in pictures.items():
        without, with_lora = (((a - b).norm() / b.norm()).item() for a, b in zip(found, exact))
        yield name, {"without": without, "with": with_lora, "growth": with_lora / without}


def bench_int8_error(options):
    """What `compute` int8 loses, as signal to noise. Of products: int8 against the exact product of
    the same packed weight, with inputs of a normal distribution, and with such as have a column in
    384 that is 50 times as large; beside it the exact product against that of the weight before it
    was packed, for formats that can be packed here. Of a step of a small Flux: exact and int8
    against the unquantised model."""
    if not int8.multiplies_integers(device()):
        print("  the device has no units for int8")
        return
    columns = min(options.sizes.weight[1], 3072)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn((columns, columns), generator=generator)
    input = torch.randn((int8.MIN_TOKENS_WITHOUT_KERNEL[device().type], columns),
                        generator=generator).to(device())
    outliers = input * torch.where(torch.arange(columns, device=device()) % 384 == 7, 50.0, 1.0)
    for name in options.formats:
        packed = packed_weight(name, original)
        weight = (random_weight(name, original.shape) if packed is None else packed).to(device())
        exact = product.linear(input, weight)
        row = {
            "int8, dB": snr(int8.linear(input, weight), exact),
            "int8 with outliers, dB": snr(int8.linear(outliers, weight),
                                          product.linear(outliers, weight))
        }
        if packed is not None:
            row["format, dB"] = snr(exact, input @ original.to(device()).t())
        yield name, row
    tensors = flux()
    unquantised = prediction(dense_flux(tensors), 64)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("Q8_0", "Q5_0", "Q4_0"):
            path = Path(folder) / f"{name}.gguf"
            write_gguf(path, tensors, lambda key, values, name=name: name
                       if values.ndim == 2 else "F32")
            models = {
                compute: load_diffusion_model(str(path), compute=compute)
                for compute in ("exact", "int8")
            }
            found = {compute: prediction(model, 64) for compute, model in models.items()}
            yield f"step, {name}", {
                f"{compute}, dB": snr(values, unquantised) for compute, values in found.items()
            }


def dense_flux(tensors, dtype=torch.float32):
    weights = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


def prediction(patcher, size: int = 32) -> torch.Tensor:
    """What a step adds to a latent of `size` by `size`, which is a quarter as many tokens."""
    generator = torch.Generator().manual_seed(0)
    latent, context = (torch.randn(shape, generator=generator).to(device())
                       for shape in ((1, 16, size, size), (1, 32, 1024)))
    comfy.model_management.load_models_gpu([patcher])
    with torch.no_grad():
        return (
            patcher.model.apply_model(
                latent, torch.tensor([0.5], device=device()), c_crossattn=context
            )
            - latent
        )


def with_loras(model, shapes: dict[str, tuple], count: int, rank: int):
    """A model with LoRAs on all its matrices, one of each seed."""
    for seed in range(count):
        model, _ = comfy.sd.load_lora_for_models(model, None, lora_file(shapes, rank, seed), 1.0,
                                                 0.0)
    return model


def lora_file(shapes: dict[str, tuple], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA in BFL's key names on every matrix of a model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{layer}.lora_up.weight"] = (
                torch.randn(shape[0], rank, generator=generator) * 0.01
            )
            tensors[f"{layer}.lora_down.weight"] = (
                torch.randn(rank, shape[1], generator=generator) * 0.01
            )
    return tensors
