"""Gemma 4 E2B, E4B, 31B and 12B, with their vision and audio towers.

The 12B has no towers: it embeds pixels and samples.
"""
import math
import re

import torch

from ....ops.tensor.row_slicing import dense
from ..arch import TOKENIZER_JSON, Arch, rename_keys
from ..tokenizer import tokenizer_json
from ._decoder import width_of, with_attention_split
from .gemma import GEMMA_NAMES, GEMMA_TENSORS, LAYER, LAYER_SCALE, PROJECTION, PROJECTION_NORM

EXPERTS = "blk.0.ffn_gate_inp.weight"
PATCHES, PATCH_NORM, POSITIONS = "v.patch_embd.weight", "v.patch_norm.1", "v.position_embd"
# Bare parameters in the host, without `.weight`.
WITHOUT_ENDING = re.compile(r"(layer_output_scale|per_dim_scale|v\.position_embd)\.weight$")
VISION, AUDIO = "vision_model.encoder.layers.{}", "audio_model.layers.{}"
# Linear layers of the towers with limits on inputs and outputs.
LIMITED = {
    "v.blk.{}.attn_q": f"{VISION}.self_attn.q_proj",
    "v.blk.{}.attn_k": f"{VISION}.self_attn.k_proj",
    "v.blk.{}.attn_v": f"{VISION}.self_attn.v_proj",
    "v.blk.{}.attn_out": f"{VISION}.self_attn.o_proj",
    "v.blk.{}.ffn_gate": f"{VISION}.mlp.gate_proj",
    "v.blk.{}.ffn_up": f"{VISION}.mlp.up_proj",
    "v.blk.{}.ffn_down": f"{VISION}.mlp.down_proj",
    "a.blk.{}.ffn_up": f"{AUDIO}.feed_forward1.ffw_layer_1",
    "a.blk.{}.ffn_down": f"{AUDIO}.feed_forward1.ffw_layer_2",
    "a.blk.{}.attn_q": f"{AUDIO}.self_attn.q_proj",
    "a.blk.{}.attn_k": f"{AUDIO}.self_attn.k_proj",
    "a.blk.{}.attn_v": f"{AUDIO}.self_attn.v_proj",
    "a.blk.{}.attn_out": f"{AUDIO}.self_attn.post",
    "a.blk.{}.conv_pw1": f"{AUDIO}.lconv1d.linear_start",
    "a.blk.{}.conv_pw2": f"{AUDIO}.lconv1d.linear_end",
    "a.blk.{}.ffn_up_1": f"{AUDIO}.feed_forward2.ffw_layer_1",
    "a.blk.{}.ffn_down_1": f"{AUDIO}.feed_forward2.ffw_layer_2",
}
LIMITS = ("input_min", "input_max", "output_min", "output_max")


class Gemma4(Arch):
    """Gemma 4, with vision and audio in the same mmproj file."""

    follows = "llama.cpp 0.5.0, conversion/gemma.py"
    names = {
        **GEMMA_NAMES,
        "blk.{}.layer_output_scale": f"{LAYER}.layer_scalar",
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
        "blk.{}.inp_gate": f"{LAYER}.per_layer_input_gate",
        "blk.{}.proj": f"{LAYER}.per_layer_projection",
        "blk.{}.post_norm": f"{LAYER}.post_per_layer_input_norm",
        **{name: f"{target}.linear" for name, target in LIMITED.items()},
        **{
            f"{name}.{limit}": f"{target}.{limit}"
            for name, target in LIMITED.items()
            for limit in LIMITS
        },
        "v.patch_embd": "vision_model.patch_embedder.input_proj",
        "v.position_embd": "vision_model.patch_embedder.position_embedding_table",
        "v.blk.{}.ln1": f"{VISION}.input_layernorm",
        "v.blk.{}.attn_q_norm": f"{VISION}.self_attn.q_norm",
        "v.blk.{}.attn_k_norm": f"{VISION}.self_attn.k_norm",
        "v.blk.{}.attn_post_norm": f"{VISION}.post_attention_layernorm",
        "v.blk.{}.ln2": f"{VISION}.pre_feedforward_layernorm",
        "v.blk.{}.ffn_post_norm": f"{VISION}.post_feedforward_layernorm",
        "v.std_bias": None,  # the host does not standardise the tower's output
        "v.std_scale": None,
        "mm.input_projection": "multi_modal_projector.embedding_projection",
        "a.conv1d.{}": "audio_model.subsample_conv_projection.layer{}.conv",
        "a.conv1d.{}.norm": "audio_model.subsample_conv_projection.layer{}.norm",
        "a.input_projection": "audio_model.subsample_conv_projection.input_proj_linear",
        "a.blk.{}.ffn_norm": f"{AUDIO}.feed_forward1.pre_layer_norm",
        "a.blk.{}.ffn_post_norm": f"{AUDIO}.feed_forward1.post_layer_norm",
        "a.blk.{}.attn_pre_norm": f"{AUDIO}.norm_pre_attn",
        "a.blk.{}.attn_k_rel": f"{AUDIO}.self_attn.relative_k_proj",
        "a.blk.{}.per_dim_scale": f"{AUDIO}.self_attn.per_dim_scale",
        "a.blk.{}.attn_post_norm": f"{AUDIO}.norm_post_attn",
        "a.blk.{}.conv_norm": f"{AUDIO}.lconv1d.pre_layer_norm",
        "a.blk.{}.conv_dw": f"{AUDIO}.lconv1d.depthwise_conv1d",
        "a.blk.{}.norm_conv": f"{AUDIO}.lconv1d.conv_norm",
        "a.blk.{}.ffn_norm_1": f"{AUDIO}.feed_forward2.pre_layer_norm",
        "a.blk.{}.ffn_post_norm_1": f"{AUDIO}.feed_forward2.post_layer_norm",
        "a.blk.{}.ln2": f"{AUDIO}.norm_out",
        "a.pre_encode.out": "audio_model.output_proj",
        "mm.a.input_projection": "audio_projector.embedding_projection",
    }
    names_without_towers = {
        **names,
        "v.patch_norm.1": "vision_model.patch_ln1",
        "v.patch_embd": "vision_model.patch_dense",
        "v.patch_norm.2": "vision_model.patch_ln2",
        "v.position_embd": "vision_model.pos_embedding",
        "v.patch_norm.3": "vision_model.pos_norm",
    }
    sees = True

    @classmethod
    def recognises(cls, weights):
        return GEMMA_TENSORS | {LAYER_SCALE} <= weights.keys() and EXPERTS not in weights

    @classmethod
    def convert(cls, weights, metadata):
        weights = {
            WITHOUT_ENDING.sub(r"\1", name): tensor
            for name, tensor in with_attention_split(weights).items()
        }
        for name, tensor in weights.items():
            if name in (PATCHES, f"{PATCH_NORM}.weight", f"{PATCH_NORM}.bias"):
                weights[name] = _channels_last(dense(tensor))
            elif name.endswith("per_dim_scale"):
                weights[name] = _inverse_softplus(dense(tensor))
        if f"{PATCH_NORM}.weight" not in weights:
            return rename_keys(weights, cls.names)
        # (2, positions, width) in the file
        weights[POSITIONS] = dense(weights[POSITIONS]).transpose(0, 1)
        return rename_keys(weights, cls.names_without_towers)

    @classmethod
    def tokenizer(cls, weights, metadata):
        return {TOKENIZER_JSON: tokenizer_json(metadata)}

    @classmethod
    def vision_width(cls, weights, vision):
        if PROJECTION not in vision or PROJECTION_NORM in vision:
            return None
        if (
            f"{PATCH_NORM}.weight" in vision
            and not {POSITIONS, f"{POSITIONS}.weight"} & vision.keys()
        ):
            return None
        return width_of(weights), vision[PROJECTION].shape[0]


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    """Reorders the weights of a square patch from channels first to the host's channels last.

    Args:
        values: (rows, 3, size, size), (rows, 3 * size * size) or (3 * size * size,).

    Returns:
        (rows, size * size * 3) or (size * size * 3,).
    """
    rows = values.shape[:1] if values.ndim > 1 else ()
    size = math.isqrt(values[0].numel() // 3 if rows else len(values) // 3)
    return values.reshape(*rows, 3, size, size).movedim(-3, -1).reshape(*rows, -1)


def _inverse_softplus(values: torch.Tensor) -> torch.Tensor:
    """Undoes the softplus of the converter, which the host computes itself."""
    return values + torch.log(-torch.expm1(-values))
