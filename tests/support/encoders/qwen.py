"""Qwen2.5 and Qwen3 for text."""
import gguf

from .encoder import Encoder

SMALL = {
    "num_hidden_layers": 3, "vocab_size": 256, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1
}
KEYS = "model.layers.0.self_attn.k_proj.bias"


def with_head(weights):
    """The host moves the head into the model."""
    return {name.replace("model.lm_head", "lm_head"): tensor for name, tensor in weights.items()}


def qwen3(te_model: str, clip_type: str, width: int, config_of: str) -> Encoder:
    markers = {
        "model.layers.0.post_attention_layernorm.weight": (width,),
        "model.layers.0.self_attn.q_norm.weight": (128,)
    }
    return Encoder(te_model, clip_type, gguf.MODEL_ARCH.QWEN3, {**SMALL, "hidden_size": width},
                   config_of, markers, published=with_head)


ENCODERS = {
    "qwen2.5-3b": Encoder("QWEN25_3B", "omnigen2", gguf.MODEL_ARCH.QWEN2,
                          {**SMALL, "num_key_value_heads": 2}, "qwen25_3b", {KEYS: (256,)}),
    "qwen3-0.6b": qwen3("QWEN3_06B", "stable_diffusion", 1024,
                        "qwen3_06b"), "qwen3-2b": qwen3("QWEN3_2B", "ovis", 2048, "qwen3_2b"),
    "qwen3-4b": qwen3("QWEN3_4B", "lumina2", 2560,
                      "qwen3_4b"), "qwen3-8b": qwen3("QWEN3_8B", "flux2", 4096, "qwen3_8b")
}
