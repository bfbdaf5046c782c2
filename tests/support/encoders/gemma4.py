"""Gemma 4."""
import gguf
import torch
from comfy.text_encoders import gemma4 as host

from featherweight.loaders.encoders.tokenizer import tokenizer_json

from .encoder import Encoder, Weights
from .gemma import SMALL

VOCABULARY = {
    "tokenizer.ggml.model": "gemma4",
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "▁", "ab"],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0
}
SMALL_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32,
    "num_hidden_layers": 2, "position_embedding_size": 32
}
SMALL_AUDIO = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
    "output_proj_dims": 96
}
SMALL_UNIFIED_VISION = {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 32}


def as_converted(weights: Weights) -> Weights:
    """As the converter stores them (llama.cpp 0.5.0, conversion/gemma.py): nothing added to the
    norms."""
    weights = {
        name + ".weight" * name.endswith("layer_scalar"): values
        for name, values in weights.items()
    }
    frequencies = torch.tensor([1.0] * 64 + [1e30] * 192)  # of rotary embeddings in global layers
    return weights | {"rope_freqs.weight": frequencies}


def gemma4(te_model: str, layers: int, last_layer: int, towers, **config) -> Encoder:
    return Encoder(
        te_model,
        "stable_diffusion",
        gguf.MODEL_ARCH.GEMMA4,
        {**SMALL, "num_hidden_layers": layers, **config},
        "gemma4",
        changed=as_converted,
        metadata=VOCABULARY,
        extra={"tokenizer_json": tokenizer_json(VOCABULARY)},
        towers=towers,
        markers={
            "model.layers.0.post_feedforward_layernorm.weight": (256,),
            # every file has it; ComfyUI 0.27 takes none for the 31B
            "model.layers.0.layer_scalar": (1,),
            f"model.layers.{last_layer}.self_attn.q_norm.weight": (256,)
        })


UNIFIED_VISION = getattr(host, "GEMMA4_UNIFIED_VISION_CONFIG", {})  # ComfyUI 0.27 has none
TOWERS = [(host.GEMMA4_VISION_CONFIG, SMALL_VISION), (host.GEMMA4_AUDIO_CONFIG, SMALL_AUDIO)]
# the last layer of each group has global attention; those that share keys and values have both
# kinds before them
ENCODERS = {
    "gemma-4-e2b": gemma4("GEMMA_4_E2B", 10, 34, TOWERS, num_kv_shared_layers=5,
                          hidden_size_per_layer_input=64),
    "gemma-4-e4b": gemma4("GEMMA_4_E4B", 12, 41, TOWERS, num_kv_shared_layers=6,
                          hidden_size_per_layer_input=64),
    "gemma-4-31b": gemma4("GEMMA_4_31B", 6, 59, [(host.GEMMA4_VISION_31B_CONFIG, SMALL_VISION)]),
    "gemma-4-12b": gemma4("GEMMA_4_12B", 6, 47, [(UNIFIED_VISION, SMALL_UNIFIED_VISION)])
}


def gemma4_mmproj(weights: Weights) -> Weights:
    """The towers in the names of llama.cpp, as its converter stores them (llama.cpp 0.5.0,
    conversion/gemma.py)."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    limits = [f".{side}_{end}" for side in ("input", "output") for end in ("min", "max")]
    stored = {}
    for name, values in weights.items():
        for ours, theirs in (("vision_model.encoder.", "vision_model.model."),
                             ("vision_model.patch_", "model.vision_tower.patch_"),
                             ("multi_modal_projector.",
                              "model.embed_vision."), ("audio_projector.", "model.embed_audio."),
                             ("audio_model.", "conformer."), (".linear.", "."),
                             ("per_dim_scale", "per_dim_scale.weight"),
                             ("position_embedding_table", "position_embedding_table.weight")):
            name = name.replace(ours, theirs)
        if name.endswith("per_dim_scale.weight"):
            values = torch.nn.functional.softplus(values)
        elif "depthwise_conv1d" in name:
            values = values[:, 0]
        elif name.endswith("patch_embedder.input_proj.weight"):
            values = values.view(-1, 16, 16, 3).permute(0, 3, 1, 2)
        stored[names.get_name(name, try_suffixes=(".weight", ".bias",
                                                  *limits))] = values.reshape(values.shape or 1)
    return stored


# gguf-py 0.19 does not know these (llama.cpp 0.5.0, gguf-py/gguf/tensor_mapping.py).
UNIFIED_NAMES = {
    "vision_model.patch_ln1": "v.patch_norm.1", "vision_model.patch_ln2": "v.patch_norm.2",
    "vision_model.pos_norm": "v.patch_norm.3", "vision_model.patch_dense": "v.patch_embd",
    "vision_model.pos_embedding": "v.position_embd.weight",
    "multi_modal_projector.embedding_projection": "mm.input_projection",
    "audio_projector.embedding_projection": "mm.a.input_projection"
}


def unified_mmproj(weights: Weights) -> Weights:
    """The same for the encoder without towers: the colours of a patch lie one after the other."""
    pixels = torch.arange(48 * 48 * 3)
    colour, row, column = pixels // (48 * 48), pixels % (48 * 48) // 48, pixels % 48
    order = row * 48 * 3 + column * 3 + colour
    stored = {}
    for name, values in weights.items():
        if name.startswith(("vision_model.patch_dense.weight", "vision_model.patch_ln1.")):
            values = values[..., order]
        elif name.endswith("pos_embedding"):
            values = values.permute(1, 0, 2)
        stem = next(stem for stem in UNIFIED_NAMES if name.startswith(stem))
        stored[name.replace(stem, UNIFIED_NAMES[stem])] = values
    return stored
