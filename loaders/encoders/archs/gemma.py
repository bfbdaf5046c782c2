"""Gemma 2 2B, Gemma 3 4B and 12B. The vision tower of Gemma 3 is SigLIP."""
from ....ops.tensor.row_slicing import dense
from ..arch import SENTENCEPIECE, Arch, rename_keys, unswap_ffn
from ..tokenizer import sentencepiece_model
from ._decoder import DECODER_NAMES, width_of, with_attention_split

LAYER, TOWER_LAYER = "model.layers.{}", "vision_model.encoder.layers.{}"
GEMMA_NAMES = {
    **DECODER_NAMES,
    "blk.{}.attn_q_norm": f"{LAYER}.self_attn.q_norm",
    "blk.{}.attn_k_norm": f"{LAYER}.self_attn.k_norm",
    "blk.{}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
    "blk.{}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
    "output": None,  # the embedding table once more
}
# Tensors that tell Gemma from other models with these norms: OLMo 2 has no norm before attention,
# GLM 4 no gate.
GEMMA_TENSORS = {
    f"blk.0.{name}.weight"
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "ffn_gate")
}
QUERY_NORM, LAYER_SCALE = "blk.0.attn_q_norm.weight", "blk.0.layer_output_scale.weight"
PROJECTION, PROJECTION_NORM = "mm.input_projection.weight", "mm.soft_emb_norm.weight"


class Gemma2(Arch):
    """Gemma 2 2B."""

    follows = "llama.cpp 0.5.0, conversion/gemma.py"
    names = GEMMA_NAMES

    @classmethod
    def recognises(cls, weights):
        return weights.keys() >= GEMMA_TENSORS and QUERY_NORM not in weights

    @classmethod
    def convert(cls, weights, metadata):
        return rename_keys(_with_host_norms(weights), cls.names)

    @classmethod
    def tokenizer(cls, weights, metadata):
        return {SENTENCEPIECE: sentencepiece_model(metadata)}


class Gemma3(Gemma2):
    """Gemma 3 4B and 12B."""

    names = {
        **GEMMA_NAMES,
        "v.patch_embd": "vision_model.embeddings.patch_embedding",
        "v.position_embd": "vision_model.embeddings.position_embedding",
        "v.blk.{}.ln1": f"{TOWER_LAYER}.layer_norm1",
        "v.blk.{}.attn_q": f"{TOWER_LAYER}.self_attn.q_proj",
        "v.blk.{}.attn_k": f"{TOWER_LAYER}.self_attn.k_proj",
        "v.blk.{}.attn_v": f"{TOWER_LAYER}.self_attn.v_proj",
        "v.blk.{}.attn_out": f"{TOWER_LAYER}.self_attn.out_proj",
        "v.blk.{}.ln2": f"{TOWER_LAYER}.layer_norm2",
        "v.blk.{}.ffn_up": f"{TOWER_LAYER}.mlp.fc1",
        "v.blk.{}.ffn_down": f"{TOWER_LAYER}.mlp.fc2",
        "v.post_ln": "vision_model.post_layernorm",
        "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
        "mm.input_projection": "multi_modal_projector.mm_input_projection_weight",
    }
    sees = True

    @classmethod
    def recognises(cls, weights):
        return (
            GEMMA_TENSORS | {QUERY_NORM} <= weights.keys()
            and not {LAYER_SCALE, "altup_proj.weight"} & weights.keys()
        )

    @classmethod
    def convert(cls, weights, metadata):
        weights = _with_host_norms(weights)
        if PROJECTION in weights:  # a bare parameter in the host, without `.weight`
            weights[PROJECTION.removesuffix(".weight")] = weights.pop(PROJECTION)
        return rename_keys(unswap_ffn(weights), cls.names)

    @classmethod
    def vision_width(cls, weights, vision):
        if not {PROJECTION, PROJECTION_NORM, "v.blk.0.ln1.weight"} <= vision.keys():
            return None
        return width_of(weights), vision[PROJECTION].shape[1]


def _with_host_norms(weights):
    """Takes 1 off the scales of the norms: the converter adds it, and so does the host at run time.

    Splits fused attention as well.
    """
    return {
        name: dense(tensor) - 1 if name.endswith("norm.weight") else tensor
        for name, tensor in with_attention_split(weights).items()
    }
