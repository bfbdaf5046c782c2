"""T5 XXL, XL and base, ByT5, UMT5, also under Wan's names, and older T5 without a gate.

Of a whole model the encoder is kept.
"""
from typing import ClassVar

from ..arch import SENTENCEPIECE, Arch, rename_keys
from ..tokenizer import sentencepiece

LAYER = "encoder.block.{}.layer"
WAN_NAME = "blocks.0.ffn.gate.0.weight"
UMT5_TOKENS = 100_000  # T5 has 32128, ByT5 1510, UMT5 256384


class T5(Arch):
    """T5, exported by llama.cpp, with the names of Wan or with those of transformers.

    The last are the host's, except for the embedding's.
    """

    follows = "llama.cpp 0.5.0, conversion/t5.py; Wan-Video/Wan2.1, wan/modules/t5.py"
    names = {
        "token_embd": "shared",
        "enc.blk.{}.attn_norm": f"{LAYER}.0.layer_norm",
        "enc.blk.{}.attn_q": f"{LAYER}.0.SelfAttention.q",
        "enc.blk.{}.attn_k": f"{LAYER}.0.SelfAttention.k",
        "enc.blk.{}.attn_v": f"{LAYER}.0.SelfAttention.v",
        "enc.blk.{}.attn_o": f"{LAYER}.0.SelfAttention.o",
        "enc.blk.{}.attn_rel_b": f"{LAYER}.0.SelfAttention.relative_attention_bias",
        "enc.blk.{}.ffn_norm": f"{LAYER}.1.layer_norm",
        "enc.blk.{}.ffn_gate": f"{LAYER}.1.DenseReluDense.wi_0",
        "enc.blk.{}.ffn_up": f"{LAYER}.1.DenseReluDense.wi_1",
        "enc.blk.{}.ffn_down": f"{LAYER}.1.DenseReluDense.wo",
        "enc.output_norm": "encoder.final_layer_norm",
    }
    names_of_wan: ClassVar = {
        "token_embedding": "shared",
        "blocks.{}.norm1": f"{LAYER}.0.layer_norm",
        **{f"blocks.{{}}.attn.{part}": f"{LAYER}.0.SelfAttention.{part}" for part in "qkvo"},
        "blocks.{}.pos_embedding.embedding": f"{LAYER}.0.SelfAttention.relative_attention_bias",
        "blocks.{}.norm2": f"{LAYER}.1.layer_norm",
        "blocks.{}.ffn.gate.{}": f"{LAYER}.1.DenseReluDense.wi_0",
        "blocks.{}.ffn.fc1": f"{LAYER}.1.DenseReluDense.wi_1",
        "blocks.{}.ffn.fc2": f"{LAYER}.1.DenseReluDense.wo",
        "norm": "encoder.final_layer_norm",
    }
    names_without_gate = {**names, "enc.blk.{}.ffn_up": f"{LAYER}.1.DenseReluDense.wi"}

    @classmethod
    def recognises(cls, weights):
        names = ("enc.blk.0.attn_q.weight", f"{LAYER}.0.SelfAttention.q.weight".format(0), WAN_NAME)
        return any(name in weights for name in names)

    @classmethod
    def convert(cls, weights, metadata):
        # The host takes a base model with a tokenizer for UMT5; `tokenizer` gives what UMT5 needs.
        unused = ("dec.", "output.", "decoder.", "lm_head.", SENTENCEPIECE)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}
        if WAN_NAME in weights:
            return rename_keys(weights, cls.names_of_wan)
        is_gated = "enc.blk.0.ffn_gate.weight" in weights
        weights = rename_keys(weights, cls.names if is_gated else cls.names_without_gate)
        # transformers saves the one embedding under either name, or both.
        embedding = weights.pop("encoder.embed_tokens.weight", None)
        return weights if embedding is None else {"shared.weight": embedding} | weights

    @classmethod
    def tokenizer(cls, weights, metadata):
        names = ("token_embd.weight", "shared.weight", "encoder.embed_tokens.weight",
                 "token_embedding.weight")
        tokens = next((len(weights[name]) for name in names if name in weights), 0)
        # The host brings the tokenizers of T5 and ByT5.
        return sentencepiece(weights, metadata) if tokens > UMT5_TOKENS else {}
