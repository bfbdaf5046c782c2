"""T5 and its relatives."""
import gguf

from .encoder import Encoder

T5_LAYER = "encoder.block.{}.layer.1.DenseReluDense.{}.weight"
T5_SMALL = {"num_layers": 2, "vocab_size": 256, "d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4}

ENCODERS = {
    "t5-xxl": Encoder(
        "T5_XXL", "sd3", gguf.MODEL_ARCH.T5ENCODER, T5_SMALL, "t5xxl", {T5_LAYER.format(23, "wi_1"): (10240, 32)}),
    "t5-xxl-old": Encoder(
        "T5_XXL_OLD", "cosmos", gguf.MODEL_ARCH.T5, T5_SMALL, "t5xxl", {T5_LAYER.format(23, "wi"): (32, 32)}),
    "t5-base": Encoder("T5_BASE", "stable_audio", gguf.MODEL_ARCH.T5ENCODER, T5_SMALL, "t5base", {
        "encoder.block.0.layer.0.SelfAttention.k.weight": (256, 256)}),
}
