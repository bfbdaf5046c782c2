"""Gemma 2 and 3."""
import gguf
from comfy.text_encoders.llama import GEMMA3_VISION_CONFIG

from featherweight.loaders.encoders.tokenizer import sentencepiece_model

from .encoder import Encoder, Weights

SMALL = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2,
    "num_key_value_heads": 1
}
SMALL_TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
    "image_size": 448
}
# Two letters are enough: what the tokenizers do is tested beside them.
VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b",
                              "▁"], "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [3, 3, 3, 2, 1, 1, 1], "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0
}


def with_one_added_to_norms(weights: Weights) -> Weights:
    """As the converter stores them (llama.cpp 0.5.0, conversion/gemma.py)."""
    return {
        name: values + 1 if name.endswith("norm.weight") else values
        for name, values in weights.items()
    }


def gemma(te_model: str, clip_type: str, layers: int, config_of: str, markers: tuple[str, ...] = (),
          **options) -> Encoder:
    """markers: names beside those that every Gemma has."""
    names = (f"model.layers.{name}.weight" for name in ("0.post_feedforward_layernorm", *markers))
    shapes = {name: (256, 256) if "proj" in name else (256,) for name in names}
    return Encoder(te_model, clip_type, options.pop("architecture", gguf.MODEL_ARCH.GEMMA3),
                   {**SMALL, "num_hidden_layers": layers}, config_of, shapes,
                   changed=with_one_added_to_norms, metadata=VOCABULARY,
                   extra={"spiece_model": sentencepiece_model(VOCABULARY)}, **options)


QUERY_NORM, TOWERS = "0.self_attn.q_norm", [(GEMMA3_VISION_CONFIG, SMALL_TOWER)]
ENCODERS = {  # every sixth layer of Gemma 3 has global attention
    "gemma-2-2b": gemma("GEMMA_2_2B", "lumina2", 3, "gemma2_2b",
                        architecture=gguf.MODEL_ARCH.GEMMA2),
    "gemma-3-4b": gemma("GEMMA_3_4B", "lumina2", 6, "gemma3_4b", (QUERY_NORM,)),
    "gemma-3-12b": gemma("GEMMA_3_12B", "ltxv", 6, "",
                         ("47.self_attn.q_norm", "5.self_attn.v_proj"), towers=TOWERS)
}
# The host takes it for another encoder than that without a tower.
GEMMA_3_4B_VISION = gemma("GEMMA_3_4B_VISION", "stable_diffusion", 6, "gemma3_4b_vision",
                          (QUERY_NORM,), towers=TOWERS)
GEMMA_3_4B_VISION.markers["vision_model.embeddings.patch_embedding.weight"] = (64, 3, 14, 14)


def gemma3_mmproj(weights: Weights) -> Weights:
    """The tower in the names of llama.cpp, as its converter stores it (llama.cpp 0.5.0,
    conversion/gemma.py)."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    stored = {}
    for name, values in weights.items():
        if name.startswith("vision_model."):
            name = f"vision_tower.{name}"
        name = name.replace("_weight", ".weight")
        if name.endswith("soft_emb_norm.weight"):
            values = values + 1
        stored[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return stored
