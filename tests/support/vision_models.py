"""Small CLIP vision models of the host's classes, under the names and with the widths that it
detects them by."""
import functools
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.clip_vision
import comfy.model_management
import torch
from controlnets import build_weights
from host_nodes import seeded

FOLDER = Path(comfy.clip_vision.__file__).parent


def shrunken(config: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers of a width that the host does not look at; SigLIP's it does."""
    small: dict[str, Any] = {"num_hidden_layers": 2}
    if not config["model_type"].startswith("siglip"):
        small |= {"hidden_size": 192, "num_attention_heads": 3}
    if "intermediate_size" in config:
        small["intermediate_size"] = 128
    if "projection_dim" in config:
        small["projection_dim"] = 64
    return {**config, **small}


def shrink(monkeypatch):
    """Has the host build vision models of this size, and compute in float32."""
    monkeypatch.setattr(comfy.clip_vision, "json", types.SimpleNamespace(
        load=lambda file: shrunken(json.load(file))))
    dino3 = comfy.clip_vision.comfy.image_encoders.dino3
    monkeypatch.setattr(dino3, "DINOV3_VITH_CONFIG", shrunken(dino3.DINOV3_VITH_CONFIG))
    monkeypatch.setattr(comfy.cli_args.args, "fp32_text_enc", True)


@functools.cache
def vision(config: str, *marks: str) -> dict[str, torch.Tensor]:
    """Random weights of a configuration in the host's folder, "" for DINOv3's.

    marks: names by which the host tells the number of layers.
    """
    if config:
        settings = shrunken(json.loads((FOLDER / f"{config}.json").read_text()))
    else:
        settings = shrunken(comfy.clip_vision.comfy.image_encoders.dino3.DINOV3_VITH_CONFIG)
    model_class = comfy.clip_vision.IMAGE_ENCODERS[settings["model_type"]]

    def build(operations, dtype, device):
        return model_class(settings, dtype, device, operations)

    return build_weights(build) | {mark: torch.ones(192) for mark in marks}


def of_transformers(config: str, *layers: int) -> Callable[[], Mapping[str, torch.Tensor]]:
    return functools.partial(vision, config, *(
        f"vision_model.encoder.layers.{layer}.layer_norm1.weight" for layer in layers))


IN_OPEN_CLIP = (
    ("vision_model.embeddings.class_embedding", "class_embedding"),
    ("vision_model.embeddings.patch_embedding", "conv1"),
    ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("vision_model.post_layernorm", "ln_post"), ("vision_model.pre_layrnorm", "ln_pre"),
    ("vision_model.encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


@functools.cache
def open_clip() -> dict[str, torch.Tensor]:
    """CLIP H as open_clip writes it: query, key and value in one, the projection transposed."""
    weights = dict(of_transformers("clip_vision_config_h", 30)())
    weights["proj"] = weights.pop("visual_projection.weight").t().contiguous()
    for layer in range(2):
        for part in ("weight", "bias"):
            names = [f"vision_model.encoder.layers.{layer}.self_attn.{name}_proj.{part}"
                     for name in "qkv"]
            weights[f"vision_model.encoder.layers.{layer}.attn.in_proj_{part}"] = torch.cat(
                [weights.pop(name) for name in names])
    renamed = {}
    for name, value in weights.items():
        for old, new in IN_OPEN_CLIP:
            name = name.replace(old, new)
        renamed[f"visual.{name}"] = value
    return renamed


VISION_MODELS = {
    "CLIP L": of_transformers("clip_vision_config_vitl", 22),
    "CLIP L 336": of_transformers("clip_vision_config_vitl_336", 22),
    "LLaVA": of_transformers("clip_vision_config_vitl_336_llava", 22),
    "CLIP H": of_transformers("clip_vision_config_h", 30),
    "CLIP bigG": of_transformers("clip_vision_config_g", 47),
    "CLIP H of open_clip": open_clip,
    "SigLIP": of_transformers("clip_vision_siglip_384", 22, 26),
    "SigLIP 2": of_transformers("clip_vision_siglip2_base_naflex", 22, 26),
    "DINOv2 large": functools.partial(vision, "image_encoders/dino2_large",
                                      "encoder.layer.23.layer_scale2.lambda1"),
    "DINOv2 giant": functools.partial(vision, "image_encoders/dino2_giant",
                                      "encoder.layer.39.layer_scale2.lambda1"),
    "DINOv3": functools.partial(vision, "", "layer.31.norm1.weight"),
}


@torch.inference_mode()
def encoded(clip_vision) -> dict[str, torch.Tensor]:
    """What the host's model makes of a picture: name -> numbers."""
    picture = seeded(1, 64, 64, 3, seed=9).abs() % 1
    if clip_vision.model_type == "dinov3":  # which ComfyUI's nodes call by themselves
        comfy.model_management.load_models_gpu([clip_vision.patcher])
        states, _, pooled, _ = clip_vision.model(picture.movedim(-1, 1))
        return {"last_hidden_state": states, "image_embeds": pooled}
    output = clip_vision.encode_image(picture)
    return {name: value for name, value in vars(output).items()
            if isinstance(value, torch.Tensor)}
