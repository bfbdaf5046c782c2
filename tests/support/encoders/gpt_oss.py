"""GPT-OSS 20B."""
import gguf
from tokenizers import Tokenizer, models

from .encoder import Encoder, Weights
from .llama import BYTE_LETTERS, as_bytes

SMALL = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2
}

METADATA = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o",
    "tokenizer.ggml.tokens": [*BYTE_LETTERS, "ab", "<|start|>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3], "tokenizer.ggml.merges": ["a b"]
}
VOCABULARY = {token: rank for rank, token in enumerate([*BYTE_LETTERS, "ab", "<|start|>"])}


def split_and_named(weights: Weights) -> Weights:
    """conversion/gpt_oss.py of llama.cpp 0.5.0: the rows of gate and up apart, and `.weight` on the
    sinks."""
    changed = {"lm_head.weight": weights["embed_tokens.weight"]}
    for name, values in weights.items():
        name = f"model.{name}"
        if ".gate_up_proj." in name:
            axis = values.ndim - 2 if name.endswith(".weight") else values.ndim - 1
            gate, up = values.unflatten(axis, (-1, 2)).unbind(axis + 1)
            changed[name.replace("gate_up_proj", "gate_proj")] = gate
            changed[name.replace("gate_up_proj", "up_proj")] = up
        else:
            changed[f"{name}.weight" if name.endswith(".sinks") else name] = values
    return changed


def quantisable(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of which the host's model has none before a file gives them."""
    attention = {
        "q_proj": (256, 128), "k_proj": (128, 128), "v_proj": (128, 128), "o_proj": (128, 256)
    }
    experts = {"gate_up_proj": (4, 2 * 96, 128), "down_proj": (4, 128, 96)}
    shapes = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"mlp.experts.{name}.weight": shape for name, shape in experts.items()}
    return {
        f"layers.{layer}.{name}": shape for layer in range(layers)
        for name, shape in shapes.items()
    }


ENCODERS = {
    "gpt-oss-20b": Encoder(
        "GPT_OSS_20B", "lens", gguf.MODEL_ARCH.GPT_OSS, SMALL, "gpt_oss",
        {"layers.0.self_attn.sinks": (4,), **quantisable(2)}, split_and_named, METADATA,
        {"tokenizer_json": as_bytes(Tokenizer(models.BPE(VOCABULARY, [("a", "b")])).to_str())}),
}
