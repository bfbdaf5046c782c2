"""python3 dev.py sizes: how many bytes popular models take in each format, and which format fits
which GPU.

Nothing is downloaded: the host's own classes are built on torch's meta device, and the shapes of
their tensors counted by the rules that quantised files follow. Prints the tables of
docs/choosing.md, with the accuracy of types beside.
"""
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from devtools.measure.weights import packed_weight, snr

import comfy.model_management
import comfy.ops
import comfy.supported_models
import comfy.text_encoders.llama as llama
import comfy.text_encoders.t5
import torch

from devtools import markdown_table
from featherweight.loaders.families import rules_for
from featherweight.loaders.packing.planning.for_device import (
    GIB,
    HOST_RESERVE_BYTES,
    Choice,
    Memory,
    Sizes,
    Weights,
    choose,
    step_memory,
    workspace_bytes,
)
from featherweight.loaders.packing.planning.plan import plan_for_type
from featherweight.loaders.packing_rules import Shapes
from featherweight.ops.tensor.packed_layout import QuantizedTensor

DENSE = {"BF16": 2, "FP8": 1}  # bytes of a value of a matrix
PACKED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "NF4", "Q3_K", "Q2_K")
COLUMNS = (*DENSE, *PACKED)
RANK = 32  # of the LoRA whose size is counted
GB = 1e9
NUMBERS = "---:"  # below the titles of columns of numbers
CARDS = (6, 8, 10, 12, 16, 24, 32)  # GiB
TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K")  # the largest first; the last is FLOOR
MAIN_GIB = 64  # main memory, in the table of cards


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        name: of it, or of several of one shape.
        make: builds the host's module of a diffusion model, or of a text encoder, on the meta
            device.
        config: the host's entry in `supported_models` and its settings; none of a text encoder.
        editing: the name of the models with these shapes that get an image too.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    config: Callable[[], Any] | None = None
    editing: str = ""

    @property
    def is_encoder(self) -> bool:
        return self.config is None

    def shapes(self) -> Shapes:
        return _shapes(self.make)


@functools.cache
def _shapes(make: Callable[[], torch.nn.Module]) -> Shapes:
    """Shapes of a module's tensors, without what an encoder sees pictures with."""
    return {name: tuple(value.shape) for name, value in make().state_dict().items()
            if not name.startswith(("visual.", "vision_model.", "multi_modal_projector."))}


def diffusion_model(name: str, supported: str, editing: str = "", **config) -> Model:
    """A model by the host's entry in `supported_models` and its settings."""

    @functools.cache
    def build():
        model_config = getattr(comfy.supported_models, supported)(dict(config))
        model_config.set_inference_dtype(torch.bfloat16, None)
        model_config.custom_operations = comfy.ops.disable_weight_init
        return model_config.get_model({}, "", device="meta")

    return Model(name, lambda: build().diffusion_model, lambda: build().model_config, editing)


def encoder(name: str, build: Callable, config: dict | None = None) -> Model:
    """A text encoder by the host's class."""
    return Model(name, lambda: build(config or {}, torch.bfloat16, "meta",
                                     comfy.ops.disable_weight_init))


def t5(name: str, config: str) -> Model:
    path = Path(comfy.text_encoders.t5.__file__).with_name(config)
    return encoder(name, comfy.text_encoders.t5.T5, json.loads(path.read_text(encoding="utf-8")))


def flux2(name: str, hidden: int, depth: int, single: int, context: int, guidance: bool) -> Model:
    return diffusion_model(
        name, "Flux2", image_model="flux2", in_channels=128, out_channels=128, patch_size=1,
        context_in_dim=context, hidden_size=hidden, mlp_ratio=3.0, num_heads=hidden // 128,
        depth=depth, depth_single_blocks=single, axes_dim=[32, 32, 32, 32], theta=2000,
        qkv_bias=False, vec_in_dim=None, guidance_embed=guidance, txt_ids_dims=[3],
        global_modulation=True, mlp_silu_act=True, ops_bias=False, default_ref_method="index",
        ref_index_scale=10.0)


def sd3(name: str, depth: int, positions: int, attention: range | None) -> Model:
    context = {"target": "torch.nn.Linear",
               "params": {"in_features": 4096, "out_features": 64 * depth}}
    return diffusion_model(
        name, "SD3", in_channels=16, out_channels=16, patch_size=2, depth=depth, input_size=None,
        adm_in_channels=2048, num_patches=positions**2, pos_embed_max_size=positions,
        pos_embed_scaling_factor=None, context_embedder_config=context, qk_norm="rms",
        x_block_self_attn_layers=list(attention or ()))


def wan(name: str, dim: int, ffn: int, layers: int, supported: str = "WAN21_T2V",
        **config) -> Model:
    config = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": dim, "out_dim": 16,
        "num_heads": dim // 128, "ffn_dim": ffn, "num_layers": layers, "in_dim": 16,
        "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, **config}
    return diffusion_model(name, supported, **config)


MODELS = (
    diffusion_model(
        "Flux.1 dev, schnell, Kontext", "Flux", editing="Flux.1 Kontext", image_model="flux",
        in_channels=16, out_channels=16, patch_size=2, context_in_dim=4096, hidden_size=3072,
        mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56],
        theta=10000, qkv_bias=True, vec_in_dim=768, guidance_embed=True, txt_ids_dims=[]),
    flux2("Flux.2 Klein 4B", 3072, 5, 20, 7680, guidance=False),
    flux2("Flux.2 Klein 9B", 4096, 8, 24, 12288, guidance=False),
    flux2("Flux.2 dev", 6144, 8, 48, 15360, guidance=True),
    sd3("SD3.5 Medium", 24, 384, range(13)),
    sd3("SD3.5 Large", 38, 192, None),
    diffusion_model(
        "SDXL", "SDXL", use_checkpoint=False, image_size=32, out_channels=4,
        use_spatial_transformer=True, legacy=False, num_classes="sequential", adm_in_channels=2816,
        in_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
        transformer_depth=[0, 0, 2, 2, 10, 10], channel_mult=[1, 2, 4],
        transformer_depth_middle=10, use_linear_in_transformer=True, context_dim=2048,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], use_temporal_attention=False,
        use_temporal_resblock=False),
    diffusion_model(
        "Qwen-Image, Qwen-Image-Edit", "QwenImage", editing="Qwen-Image-Edit",
        image_model="qwen_image", in_channels=64, num_layers=60, num_attention_heads=24,
        joint_attention_dim=3584),
    diffusion_model(
        "Z-Image", "ZImage", image_model="lumina2", patch_size=2, in_channels=16, dim=3840,
        cap_feat_dim=2560, n_layers=30, qk_norm=True, n_heads=30, n_kv_heads=30,
        axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
        ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32),
    diffusion_model("Krea 2", "Krea2", image_model="krea2"),
    wan("Wan 2.1 1.3B", 1536, 8960, 30),
    wan("Wan 2.2 5B", 3072, 14336, 30, "WAN22_T2V", in_dim=48, out_dim=48),
    wan("Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)", 5120, 13824, 40),
    wan("Wan 2.1 14B I2V", 5120, 13824, 40, "WAN21_I2V", model_type="i2v", in_dim=36),
    diffusion_model("LTX-2", "LTXAV", image_model="ltxav", num_layers=48),
    diffusion_model("MiniMax-H3 pruned", "MiniMaxH3", image_model="minimax_h3",
                    adaln_curve_grid=1025, time_embed_dim=8),
    t5("T5-XXL", "t5_config_xxl.json"),
    t5("UMT5-XXL", "umt5_config_xxl.json"),
    encoder("Qwen3 4B", llama.Qwen3_4B),
    encoder("Qwen3 8B", llama.Qwen3_8B),
    encoder("Qwen2.5-VL 7B", llama.Qwen25_7BVLI),
    encoder("Gemma 3 12B", llama.Gemma3_12B),
)


def bytes_of(shapes: Shapes, column: str) -> int:
    """Bytes of a file's tensors: dense with every matrix in FP8 or 16 bits, or packed as files are
    made here."""
    if column in DENSE:
        return sum(
            math.prod(shape) * (DENSE[column] if len(shape) == 2 else 2)
            for shape in shapes.values())
    return plan_for_type(shapes, column, rules_for(shapes)).nbytes(shapes)


def lora_bytes(shapes: Shapes) -> int:
    """A LoRA of rank `RANK` on every matrix of the blocks, in 16 bits."""
    matrices = [
        shape for name, shape in shapes.items() if len(shape) == 2 and re.search(r"\.\d+\.", name)
    ]
    return sum(2 * RANK * (rows + columns) for rows, columns in matrices)


def sizes_table() -> str:
    """Gigabytes (10⁹ bytes) of each model in each format, and of a LoRA for it."""
    rows = []
    for model in MODELS:
        shapes = model.shapes()
        parameters = sum(map(math.prod, shapes.values())) / 1e9
        sizes = [f"{bytes_of(shapes, column) / GB:.1f}" for column in COLUMNS]
        rows.append([
            model.name, f"{parameters:.1f}", *sizes,
            "" if model.is_encoder else f"{lora_bytes(shapes) / GB:.2f}"
        ])
    titles = ["GB", "10⁹ parameters", *COLUMNS, f"LoRA, rank {RANK}"]
    return markdown_table(titles, rows, NUMBERS)


def cards_table() -> str:
    """The type of each diffusion model for a GPU."""
    rows = []
    for model in MODELS:
        if model.config and step_memory(model.config()):
            name = model.name.removesuffix(f", {model.editing.removeprefix('Flux.1 ')}")
            rows.append(_cards_row(model, name, 0))
        if model.editing:
            rows.append(_cards_row(model, model.editing, 1))
    titles = ["model", "for", "work, GiB", *(f"{card} GB" for card in CARDS)]
    return markdown_table(titles, rows, NUMBERS)


def _cards_row(model: Model, name: str, images: int) -> list[str]:
    """Returns a row for models that get so many images."""
    nbytes, picture = _step(model, images)
    if images:
        picture += ", with an image"
    work = (nbytes + HOST_RESERVE_BYTES) / GIB
    return [name, picture, f"{work:.1f}", *(card_text(model, card, images) for card in CARDS)]


def card_text(model: Model, gib: int, images: int = 0, main_gib: int = MAIN_GIB) -> str:
    """Returns the type for a card, as in "Q6_K", or "Q4_K+0.9" with the GB that are copied: the
    largest with which the whole model stays on it, else what *fit this GPU* chooses.

    Args:
        model: a diffusion model.
        gib: of the card.
        images: that the model gets too.
        main_gib: the main memory.
    """
    for name in TYPES:
        workspace = 0 if name in DENSE else workspace_bytes(model.shapes())
        room = Memory(gib).for_model(_step(model, images)[0], workspace)
        if _type_bytes(model, name) <= room:
            return name
    choice = fit_choice(model, gib, images, main_gib)
    return f"{choice.grade}+{choice.copied / GB:.1f}"


def fit_choice(model: Model, gib: int, images: int = 0, main_gib: int = MAIN_GIB) -> Choice:
    """Returns what *fit this GPU* chooses for a file in BF16; args: as for `card_text`."""
    memory = Memory(gib, main_gib=main_gib)
    assert model.config is not None
    return choose(_sizes(model), functools.partial(memory.for_model, _step(model, images)[0]),
                  main=memory.for_copying(model.config()))


@functools.cache
def _sizes(model: Model) -> Sizes:
    """Returns those of a file in BF16."""
    shapes = model.shapes()
    return Sizes([Weights(shapes, bytes_of(shapes, "BF16"), {})])


@functools.cache
def _type_bytes(model: Model, name: str) -> int:
    return plan_for_type(model.shapes(), name, rules_for(model.shapes())).nbytes(model.shapes())


def _step(model: Model, images: int) -> tuple[float, str]:
    assert model.config is not None
    step = step_memory(model.config(), images)
    assert step is not None, model.name
    return step


def accuracy_table() -> str:
    """The error of normally distributed weights after packing, in % of the weights, for the formats
    that can be packed here."""
    weights = torch.randn(1024, 3072, generator=torch.Generator().manual_seed(0))
    errors = {name: snr(weights.to(torch.float8_e4m3fn).float() if name == "FP8"
                        else cast(QuantizedTensor, packed_weight(name, weights)).dequantize(),
                        weights)
              for name in ("Q8_0", "FP8", "Q5_0", "Q4_0", "NF4", "FP4")}
    row = ["%", *(f"{100 * 10 ** (-value / 20):.2g}" for value in errors.values())]
    return markdown_table(["", *errors], [row], NUMBERS)


TABLES = (sizes_table, cards_table, accuracy_table)

if __name__ == "__main__":
    for make in TABLES:
        print(make())
