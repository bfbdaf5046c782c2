"""The names that llama.cpp gives to what all decoders have. A family adds its own, or says otherwise."""

LAYER = "model.layers.{}"

DECODER_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
    "blk.{}.attn_q": f"{LAYER}.self_attn.q_proj",
    "blk.{}.attn_k": f"{LAYER}.self_attn.k_proj",
    "blk.{}.attn_v": f"{LAYER}.self_attn.v_proj",
    "blk.{}.attn_output": f"{LAYER}.self_attn.o_proj",
    "blk.{}.ffn_norm": f"{LAYER}.post_attention_layernorm",
    "blk.{}.ffn_gate": f"{LAYER}.mlp.gate_proj",
    "blk.{}.ffn_up": f"{LAYER}.mlp.up_proj",
    "blk.{}.ffn_down": f"{LAYER}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
    # The host computes rotary embeddings from its configuration.
    "rope_freqs": None,
    "blk.{}.attn_rot_embd": None,
}
