"""A packed T5 of a few layers as the host's CLIP, its LoRAs, and what it makes of some tokens."""
import dataclasses
import functools
from pathlib import Path

import comfy.sd
import torch
from encoders import ENCODERS
from encoders.encoder import TOKENS, random_weights, write_encoder
from pack_api import load_text_encoder
from patched_models import folder, lora_for


@functools.cache
def t5_file(format_name: str, layers: int, width: int) -> tuple[Path, dict, dict]:
    """The path of the packed file, its dense values, and the host's options that make the encoder
    as small."""
    config = {"num_layers": layers, "vocab_size": 256, "d_model": width,
              "d_ff": 4 * width, "d_kv": 64, "num_heads": width // 64}
    encoder = dataclasses.replace(ENCODERS["t5-xxl"], config=config)
    path, values = (
        Path(folder().name, f"t5-{format_name}-{layers}-{width}.gguf"),
        random_weights(encoder),
    )
    write_encoder(path, encoder, values, format_name)
    return path, values, encoder.model_options


def small_t5(format_name: str, layers: int, width: int = 512,
             **options) -> tuple[comfy.sd.CLIP, dict[str, torch.Tensor]]:
    """A T5 and its dense values, with 4.2 million weights a layer where it is 512 wide.

    Args:
        options: more of the host's for it.
    """
    path, values, sizes = t5_file(format_name, layers, width)
    return load_text_encoder([str(path)], "sd3", model_options={**sizes, **options}), values


def lora_for_t5(*args, **kwargs) -> dict[str, torch.Tensor]:
    """What `lora_for` gives, for a T5."""
    return lora_for(*args, layer_name="text_encoders.t5xxl.transformer.{}".format, **kwargs)


def patched_clip(clip: comfy.sd.CLIP, *loras) -> comfy.sd.CLIP:
    """A clone with LoRAs stacked by the host's own loader: (LoRA, strength) each."""
    for lora, strength in loras:
        _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)
    return clip


def encode(clip: comfy.sd.CLIP) -> torch.Tensor:
    """What a T5 makes of some tokens, on the CPU. The host loads the encoder for it."""
    return clip.encode_from_tokens(
        {"l": [], "g": [], "t5xxl": [[(token, 1.0) for token in TOKENS]]}).cpu()
