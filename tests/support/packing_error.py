"""Output errors of packed weights where nothing was measured: the demo's matrices under inputs of
held-out captions."""
import functools
import itertools

import torch

from demo_model import scenes, text
from demo_model.flux import Flux
from devtools.files import demo_files
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.quantize.pack_tensor import pack_tensor

# Mean of 10 log10 (|Wx|^2 / |(W - V)x|^2) over the block matrices, dB; at least what llama.cpp's
# own search without importance reaches.
LEAST = {"Q2_K": 19.4, "Q3_K": 25.35, "Q4_K": 32.0, "Q5_K": 38.2, "Q6_K": 44.1, "IQ4_XS": 31.2}
STEPS = 12
BATCH = 32


def second_moments(weights: dict[str, torch.Tensor], captions: int = 64,
                   times: int = 4) -> dict[str, torch.Tensor]:
    """Of each block matrix the sum of x x^T, float32 (K, K), over its inputs at random times of
    pictures that are drawn."""
    model, sums = Flux().eval().requires_grad_(False), {}
    model.load_state_dict(weights)

    def add(name, layer, inputs):
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums[name] = sums.get(name, 0) + rows.T @ rows

    generator = torch.Generator().manual_seed(77)
    held_out = [scene.caption().split() for scene in scenes.all_scenes()[1][:captions]]
    with torch.inference_mode():
        for start in range(0, captions, BATCH):
            words = held_out[start:start + BATCH]
            given = (
                torch.stack([text.encode(each) for each in words]),
                torch.stack([text.bias(len(each)) for each in words]),
            )
            shape = len(words), 16, scenes.SIZE // 8, scenes.SIZE // 8
            drawn = torch.randn(shape, generator=generator)
            sigmas = torch.linspace(1, 0, STEPS + 1)
            for sigma, following in itertools.pairwise(sigmas):
                drawn = drawn + (following - sigma) * model(drawn, sigma.expand(len(words)), *given)
            modules = dict(model.named_modules())
            hooks = [
                modules[name.removesuffix(".weight")].register_forward_pre_hook(
                    functools.partial(add, name)) for name in block_matrices(weights)
            ]
            for _ in range(times):
                at = torch.rand(len(words), generator=generator)
                part = at.view(-1, 1, 1, 1)
                model(
                    torch.randn(shape, generator=generator) * part + (1 - part) * drawn, at, *given)
            for hook in hooks:
                hook.remove()
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
