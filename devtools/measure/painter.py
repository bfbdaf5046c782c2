"""Draws prompts with the demo's model, as latents, and tells how far two models' are apart."""
from pathlib import Path
from typing import cast

import comfy.model_management
import comfy.sample
import comfy.sd
import torch
from safetensors.torch import load_file

from demo_model import scenes
from demo_model.autoencoder import SCALE, SHIFT
from devtools.demo import STEPS
from devtools.files import demo_files
from featherweight.loaders.models.text_encoder import load_text_encoder

BATCH = 32


class Painter:
    """Draws prompts with a model, a batch at a time; the noise of each picture depends on its
    number only."""

    def __init__(self, prompts: list[str], folder: Path):
        path = folder / demo_files.ENCODER_NAME
        demo_files.write_encoder(path)
        clip = load_text_encoder([str(path)], "stable_diffusion")
        self.words = [
            cast(torch.Tensor, clip.encode_from_tokens(clip.tokenize(prompt))).float().cpu()
            for prompt in prompts
        ]
        self.noise = [
            torch.randn(1, 16, scenes.SIZE // 8, scenes.SIZE // 8,
                        generator=torch.Generator().manual_seed(number))
            for number in range(len(prompts))
        ]

    @torch.inference_mode()
    def latents(self, model, count: int) -> torch.Tensor:
        """Latents of the first `count` prompts, (count, 16, H / 8, W / 8)."""
        parts = []
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            words, noise = torch.cat(self.words[part]), torch.cat(self.noise[part])
            drawn = comfy.sample.sample(model, noise, STEPS, 1.0, "euler",
                                        "simple", [[words, {}]], [[words, {}]],
                                        torch.zeros_like(noise), disable_pbar=True, seed=start)
            parts.append((drawn.float().cpu() - SHIFT) * SCALE)
        return torch.cat(parts)

    @torch.inference_mode()
    def predictions(self, model) -> torch.Tensor:
        """What the model says of the same noise and half-drawn noise for the first prompts, (2 *
        BATCH, 16, H / 8, W / 8)."""
        comfy.model_management.load_models_gpu([model])
        words, noise = torch.cat(self.words[:BATCH]), torch.cat(self.noise[:BATCH])
        guesses = [
            model.model.apply_model(noise * sigma, torch.full((len(noise),), sigma),
                                    c_crossattn=words) for sigma in (1.0, 0.6)
        ]
        return torch.cat(guesses).float().cpu()


def with_lora(model, name: str):
    lora = load_file(demo_files.WEIGHTS / f"lora_{name}.safetensors")
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def psnr(values: torch.Tensor, dense: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of latents against the dense model's, whose range is the
    peak."""
    return float(20 * torch.log10(dense.max() - dense.min()) -
                 10 * torch.log10((values - dense).square().mean()))
