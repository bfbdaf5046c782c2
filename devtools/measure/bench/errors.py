"""What is lost, as signal to noise: by formats, and by products of whole numbers."""
import contextlib
import tempfile
from pathlib import Path
from typing import cast

from devtools.measure.random_models import prediction
from devtools.measure.timing import device
from devtools.measure.weights import packed_weight, random_weight, snr

import comfy.sd
import torch

from devtools.files.gguf_files import write_gguf
from devtools.files.tiny_models import flux
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.layers import fast_on_cpu, product
from featherweight.ops.tensor.packed_tensor import PackedTensor

TYPES = ("Q8_0", "Q5_0", "Q4_0")


@contextlib.contextmanager
def small_flux_files():
    """Gives type -> path of a small Flux whose matrices are of that type."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.gguf" for name in TYPES}
        for name, path in paths.items():
            write_gguf(path, flux(),
                       lambda key, values, name=name: name if values.ndim == 2 else "F32")
        yield paths


def dense_flux():
    weights = {name: torch.from_numpy(value.copy()) for name, value in flux().items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


def bench_int8_error(options):
    """What `compute` int8 loses, as signal to noise. Of products: int8 against the exact product of
    the same packed weight, with inputs of a normal distribution, and with such as have a column in
    384 that is 50 times as large; beside it the exact product against that of the weight before it
    was packed, for formats that can be packed here. Of a step of a small Flux: exact and int8
    against the unquantised model."""
    if not fast_on_cpu.multiplies_integers(device()):
        print("  the device has no units for int8")
        return
    columns = min(options.sizes.weight[1], 3072)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn((columns, columns), generator=generator)
    input = torch.randn((fast_on_cpu.MIN_TOKENS_WITHOUT_KERNEL, columns),
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
