"""A case on the demo's trained Flux as Nunchaku writes it."""
import contextlib
import tempfile
from pathlib import Path
from unittest import mock

from devtools.measure.bench.timing import device
from devtools.measure.quality import Painter, psnr, with_lora
from devtools.measure.weights import snr

import nunchaku_writer as writer
import torch
from diffusers_names import DIFFUSERS, in_diffusers_names

from demo_model import scenes
from devtools.files import demo_files
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.layers import kitchen_products

CONFIG = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 256}
LORA = "ink"


def bench_svdquant_error(options):
    """Pictures of the demo's Flux in SVDQuant int4, whose smoothing is random and not calibrated,
    as latents against the unquantised model's: in float by the file's weights (`exact`), and with
    inputs of 4 bits by comfy_kitchen (`int8`), on a CPU by its reference. The same with a LoRA on
    both, and how much `int8` is off `exact`."""
    count = options.sizes.pictures
    captions = [scene.caption() for scene in scenes.all_scenes()[1][:count]]
    weights = {name.replace("_norm.scale", "_norm.weight"): values.float()
               for name, values in demo_files.flux().items()}
    on_a_cpu = device().type == "cpu"
    backends = mock.patch.object(kitchen_products, "BACKENDS", ("eager",)) if on_a_cpu else (
        contextlib.nullcontext())
    with tempfile.TemporaryDirectory() as folder, backends:
        painter, path = Painter(captions, Path(folder)), Path(folder) / "model.safetensors"
        demo_files.write_model(path, "F16")
        dense = _drawn(painter, load_diffusion_model(str(path)), count)
        for rank in options.sizes.ranks:
            stored = in_diffusers_names(weights, DIFFUSERS["flux-dev"](CONFIG))
            writer.write(path, writer.flux(stored, rank=rank))
            exact, fast = (
                _drawn(painter, load_diffusion_model(str(path), compute=compute), count)
                for compute in ("exact", "int8"))
            for index, title in enumerate(("", f", LoRA {LORA}")):
                yield f"rank {rank}{title}", {
                    "exact, dB": snr(exact[index], dense[index]),
                    "int8, dB": snr(fast[index], dense[index]),
                    "int8 against exact, dB": snr(fast[index], exact[index]),
                    "exact, PSNR in dB": psnr(exact[index], dense[index]),
                    "int8, PSNR in dB": psnr(fast[index], dense[index])}


def _drawn(painter: Painter, model, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents without and with a LoRA."""
    return painter.latents(model, count), painter.latents(with_lora(model, LORA), count)
