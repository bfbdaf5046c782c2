"""What decoders share in llama.cpp's files: names, fused attention, rows for rotary embedding."""
import re
from collections.abc import Collection, Mapping

import torch

from ....ops.tensor.row_slicing import take_rows
from ..arch import Weights, rename_keys

# A family adds its own names or replaces some of these.
DECODER_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
    # The host computes rotary embeddings from its configuration.
    "rope_freqs": None,
    "blk.{}.attn_rot_embd": None,
}
LAYER_0 = {f"{name.format(0)}.weight" for name in DECODER_NAMES if name.startswith("blk.")}

HEAD = 128  # width of an attention head in all models that the host has


def width_of(weights: Mapping[str, torch.Tensor]) -> int:
    """Returns how wide the embeddings of tokens are, 0 where the file has none."""
    table = weights.get("token_embd.weight")
    return 0 if table is None else table.shape[1]


def is_plain_decoder(weights: Mapping[str, torch.Tensor], widths: Collection[int]) -> bool:
    """Returns whether this is a decoder of one of these widths whose layers hold nothing else."""
    key = weights.get("blk.0.attn_k.weight")
    if key is None or key.ndim != 2 or key.shape[0] % HEAD or key.shape[1] not in widths:
        return False
    return LAYER_0.issuperset(name for name in weights if name.startswith("blk.0."))


def with_attention_split(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Splits q, k and v where the converter was asked to fuse them; names stay the file's."""
    split = {}
    for name, tensor in weights.items():
        if not re.fullmatch(r"blk\.\d+\.attn_qkv\.weight", name):
            split[name] = tensor
            continue
        layer = name.removesuffix("attn_qkv.weight")
        q_end = weights[f"{layer}attn_output.weight"].shape[1]
        k_end = (len(tensor) + q_end) // 2
        rows = {"q": slice(0, q_end), "k": slice(q_end, k_end), "v": slice(k_end, len(tensor))}
        for part, part_rows in rows.items():
            split[f"{layer}attn_{part}.weight"] = take_rows(tensor, part_rows)
    return split


def with_rotary_halves(weights: Weights) -> Weights:
    """Converts a plain decoder to the host's names and the row order of its rotary embedding.

    llama.cpp rotates neighbouring rows of q and k as pairs, the host rows half a head apart. The
    host does not use the output layer.
    """
    weights = rename_keys(weights, DECODER_NAMES | {"output": None})
    for name, tensor in weights.items():
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            order = torch.arange(len(tensor)).view(-1, HEAD // 2, 2).transpose(1, 2).flatten()
            weights[name] = take_rows(tensor, order)
    return weights
