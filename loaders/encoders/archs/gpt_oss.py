"""GPT-OSS 20B, the text encoder of Lens. Its experts stay in MXFP4."""
import torch

from ....ops.tensor.row_slicing import dense, interleave_rows
from ..arch import TOKENIZER_JSON, Arch, rename_keys
from ..tokenizer import tokenizer_json
from ._decoder import DECODER_NAMES

GATE, UP = ".ffn_gate_exps", ".ffn_up_exps"


class GptOss(Arch):
    """GPT-OSS 20B."""

    follows = "llama.cpp 0.5.0, conversion/gpt_oss.py"
    names = {
        **{
            name: target and target.removeprefix("model.")
            for name, target in DECODER_NAMES.items()
        },
        "blk.{}.post_attention_norm": "layers.{}.post_attention_layernorm",
        "blk.{}.ffn_gate_inp": "layers.{}.mlp.router",
        "blk.{}.ffn_gate_up_exps": "layers.{}.mlp.experts.gate_up_proj",
        "blk.{}.ffn_down_exps": "layers.{}.mlp.experts.down_proj",
        "blk.{}.attn_sinks": "layers.{}.self_attn.sinks",
        "output": None,
    }

    @classmethod
    def recognises(cls, weights):
        return "blk.0.attn_sinks.weight" in weights

    @classmethod
    def convert(cls, weights, metadata):
        """Interleaves the rows of the experts' gate and up, which llama.cpp stores apart."""
        weights = {
            name.removesuffix(".weight") if "attn_sinks" in name else name: tensor
            for name, tensor in weights.items()
        }
        for name in [name for name in weights if GATE in name]:
            parts = [weights.pop(name), weights.pop(name.replace(GATE, UP))]
            is_bias = name.endswith(".bias")
            weights[name.replace(GATE, ".ffn_gate_up_exps")] = (
                torch.stack([dense(part) for part in parts], -1).flatten(-2)
                if is_bias
                else interleave_rows(parts)
            )
        return rename_keys(weights, cls.names)

    @classmethod
    def tokenizer(cls, weights, metadata):
        return {TOKENIZER_JSON: tokenizer_json(metadata)}
