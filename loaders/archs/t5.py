"""T5: XXL, XL, base, UMT5 and their older forms without a gate. llama.cpp's exports of encoders, or of whole models."""
from ..arch import SENTENCEPIECE, Arch, renamed
from ..tokenizer import sentencepiece_model

LAYER = "encoder.block.{}.layer"


class T5(Arch):
    follows = "llama.cpp 0.5.0, conversion/t5.py"
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
    ungated = {**names, "enc.blk.{}.ffn_up": f"{LAYER}.1.DenseReluDense.wi"}

    @classmethod
    def recognises(cls, weights):
        return "enc.blk.0.attn_q.weight" in weights

    @classmethod
    def convert(cls, weights, metadata):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("dec.", "output."))}
        return renamed(weights, cls.names if "enc.blk.0.ffn_gate.weight" in weights else cls.ungated)

    @classmethod
    def tokenizer(cls, weights, metadata):
        # UMT5 has a bias in every layer. The host has the tokenizer of the others.
        return {SENTENCEPIECE: sentencepiece_model(metadata)} if "enc.blk.1.attn_rel_b.weight" in weights else {}
