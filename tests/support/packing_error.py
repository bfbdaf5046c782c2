"""Output errors of packed weights where nothing was measured: the demo's matrices under the inputs
that they get while held-out captions are drawn."""
import contextlib
import functools
import tempfile
from pathlib import Path

from devtools.measure.painter import Painter

import torch
from pack_api import FORMATS, load_diffusion_model, pack_tensor

from demo_model import scenes
from devtools.files import demo_files

# Mean of 10 log10 (|Wx|^2 / |(W - V)x|^2) over the block matrices, dB: a little less than what was
# found, which is at least what llama.cpp's own search without importance reached.
LEAST = {"Q2_K": 19.5, "Q3_K": 25.4, "Q4_K": 32.1, "Q5_K": 38.3, "Q6_K": 44.2, "IQ4_XS": 31.3}


def second_moments(captions: int = 8) -> dict[str, torch.Tensor]:
    """Of each block matrix the sum of x x^T, float32 (K, K), over its inputs."""
    sums: dict[str, torch.Tensor] = {}

    def add(name, layer, inputs):
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums[name] = sums.get(name, 0) + rows.T @ rows

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as hooks:
        painter = Painter([scene.caption() for scene in scenes.all_scenes()[1][:captions]],
                          Path(folder))
        demo_files.write_model(Path(folder) / "dense.safetensors", "F16")
        model = load_diffusion_model(str(Path(folder) / "dense.safetensors"))
        model.set_model_compute_dtype(torch.float32)
        layers = dict(model.model.diffusion_model.named_modules())
        for name in block_matrices(demo_weights()):
            hooks.enter_context(layers[name.removesuffix(".weight")].register_forward_pre_hook(
                functools.partial(add, name)))
        painter.latents(model, captions)
    return sums


def block_matrices(weights: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, weight in weights.items() if "blocks." in name and weight.ndim == 2]


def demo_weights() -> dict[str, torch.Tensor]:
    return {name: weight.float() for name, weight in demo_files.flux().items()}


def output_snr(weight: torch.Tensor, values: torch.Tensor, moments: torch.Tensor) -> float:
    """How much stronger the outputs of a layer are than their error, dB. weight, values: (N, K),
    moments: (K, K)."""
    off = values - weight
    return float(10 * torch.log10(
        ((weight @ moments) * weight).sum() / ((off @ moments) * off).sum()))


def mean_snr(type_name: str, weights: dict[str, torch.Tensor],
             moments: dict[str, torch.Tensor]) -> float:
    """Mean over the block matrices, each packed by itself."""
    return sum(
        output_snr(
            weights[name],
            pack_tensor(weights[name], FORMATS[type_name]).dequantize(),
            moments[name],
        )
        for name in moments
    ) / len(moments)
