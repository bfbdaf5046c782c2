"""Cases of what is lost, as signal to noise: by formats, by LoRAs on them, by products of whole
numbers."""
import contextlib
import tempfile
from pathlib import Path
from typing import cast
from unittest import mock

from devtools.measure.painter import Painter, psnr, with_lora
from devtools.measure.random_models import lora_file, prediction
from devtools.measure.timing import device
from devtools.measure.weights import packed_weight, random_weight, snr

import comfy.sd
import nunchaku_writer as writer
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names

from demo_model import scenes
from devtools.files import demo_files
from devtools.files.gguf_files import write_gguf
from devtools.files.tiny_models import flux
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.layers import int8, kitchen_products, product
from featherweight.ops.tensor.packed_tensor import PackedTensor

TYPES = ("Q8_0", "Q5_0", "Q4_0")
DEMO_FLUX = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 256}
DEMO_LORA, SVDQUANT_RANK = "ink", 32


@contextlib.contextmanager
def small_flux_files():
    """Gives type -> path of a small Flux whose matrices are of that type."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.gguf" for name in TYPES}
        for name, path in paths.items():
            write_gguf(path, flux(),
                       lambda key, values, name=name: name if values.ndim == 2 else "F32")
        yield paths


def dense_flux(dtype=torch.float32):
    weights = {name: torch.from_numpy(value.copy()) for name, value in flux().items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


def bench_lora_error(options):
    """Error of a small quantised Flux against the unquantised one, without and with a LoRA on both
    (growth 1: none)."""
    lora = lora_file({name: value.shape for name, value in flux().items()}, 16, 0)
    models = {"float32": dense_flux(), "fp8 (ComfyUI)": dense_flux(torch.float8_e4m3fn)}
    with small_flux_files() as paths:
        models |= {name: load_diffusion_model(str(path)) for name, path in paths.items()}
        found = {name: (prediction(model), prediction(
            comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]))
            for name, model in models.items()}
    exact = found.pop("float32")
    for name, predictions in found.items():
        without, with_lora = (((a - b).norm() / b.norm()).item()
                              for a, b in zip(predictions, exact))
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
    input = torch.randn((int8.MIN_TOKENS_WITHOUT_KERNEL, columns),
                        generator=generator).to(device())
    outliers = input * torch.where(torch.arange(columns, device=device()) % 384 == 7, 50.0, 1.0)
    for name in options.formats:
        packed = packed_weight(name, original)
        weight = cast(PackedTensor, (random_weight(name, original.shape) if packed is None
                                     else packed).to(device()))
        exact = product.linear(input, weight)
        row = {"int8, dB": snr(product.linear(input, weight, fast=True), exact),
               "int8 with outliers, dB": snr(product.linear(outliers, weight, fast=True),
                                             product.linear(outliers, weight))}
        if packed is not None:
            row["format, dB"] = snr(exact, input @ original.to(device()).t())
        yield name, row
    unquantised = prediction(dense_flux(), 64)
    with small_flux_files() as paths:
        for name, path in paths.items():
            yield f"step, {name}", {
                f"{compute}, dB": snr(prediction(load_diffusion_model(str(path), compute=compute),
                                                 64), unquantised)
                for compute in ("exact", "int8")}


def bench_svdquant_error(options):
    """Pictures of the demo's Flux in SVDQuant int4, whose smoothing is random and not calibrated,
    as latents against the unquantised model's: in float by the file's weights (`exact`), and with
    inputs of 4 bits by comfy_kitchen (`int8`), on a CPU by its reference. The same with a LoRA on
    both, and how much `int8` is off `exact`."""
    count = options.sizes.pictures
    captions = [scene.caption() for scene in scenes.all_scenes()[1][:count]]
    weights = {name.replace("_norm.scale", "_norm.weight"): values.float()
               for name, values in demo_files.flux().items()}
    backends = mock.patch.object(kitchen_products, "BACKENDS", ("eager",))

    def drawn(path: Path, **options) -> list[torch.Tensor]:
        """Latents without and with a LoRA."""
        model = load_diffusion_model(str(path), **options)
        return [painter.latents(each, count) for each in (model, with_lora(model, DEMO_LORA))]

    with (tempfile.TemporaryDirectory() as folder,
          backends if device().type == "cpu" else contextlib.nullcontext()):
        painter, path = Painter(captions, Path(folder)), Path(folder) / "model.safetensors"
        demo_files.write_model(path, "F16")
        dense = drawn(path)
        stored = in_diffusers_names(weights, DIFFUSERS["flux-dev"](DEMO_FLUX))
        writer.write(path, writer.flux(stored, rank=SVDQUANT_RANK))
        found = [drawn(path, compute=compute) for compute in ("exact", "int8")]
        for title, reference, exact, fast in zip(("", f", LoRA {DEMO_LORA}"), dense, *found):
            yield f"rank {SVDQUANT_RANK}{title}", {
                "exact, dB": snr(exact, reference), "int8, dB": snr(fast, reference),
                "int8 against exact, dB": snr(fast, exact),
                "exact, PSNR in dB": psnr(exact, reference),
                "int8, PSNR in dB": psnr(fast, reference)}
