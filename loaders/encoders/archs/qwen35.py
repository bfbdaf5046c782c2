"""Qwen3.5, with or without its vision tower.

Three of four layers are linear attention (a gated delta rule).
"""
import torch

from ....ops.formats.column_groups import ColumnGroups
from ....ops.tensor.packed_layout import is_packed, packed_tensor, packed_tensors
from ....ops.tensor.row_slicing import dense, take_rows
from ..arch import Arch, Weights, rename_keys
from . import qwen_vl
from ._decoder import DECODER_NAMES, width_of

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers.{{}}"
LINEAR = f"{LAYER}.linear_attn"


class Qwen35(Arch):
    """Qwen3.5 0.8B to 27B."""

    follows = "llama.cpp 0.5.0, conversion/qwen.py (Qwen3NextModel, _LinearAttentionVReorderBase)"
    names = {
        **{
            name: target and target.replace("model.", f"{TEXT}.", 1)
            for name, target in DECODER_NAMES.items()
        },
        "blk.{}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
        "blk.{}.attn_q_norm": f"{LAYER}.self_attn.q_norm",
        "blk.{}.attn_k_norm": f"{LAYER}.self_attn.k_norm",
        "blk.{}.attn_qkv": f"{LINEAR}.in_proj_qkv",
        "blk.{}.attn_gate": f"{LINEAR}.in_proj_z",
        "blk.{}.ssm_alpha": f"{LINEAR}.in_proj_a",
        "blk.{}.ssm_beta": f"{LINEAR}.in_proj_b",
        "blk.{}.ssm_a": f"{LINEAR}.A_log",
        "blk.{}.ssm_dt": f"{LINEAR}.dt",
        "blk.{}.ssm_conv1d": f"{LINEAR}.conv1d",
        "blk.{}.ssm_norm": f"{LINEAR}.norm",
        "blk.{}.ssm_out": f"{LINEAR}.out_proj",
    }
    sees = True
    widths = (1024, 2048, 2560, 4096, 5120)

    @classmethod
    def recognises(cls, weights):
        required = {
            "blk.0.ssm_a", "blk.0.ssm_alpha.weight", "blk.0.attn_qkv.weight",
            "blk.0.ffn_gate.weight"
        }
        return required <= weights.keys() and width_of(weights) in cls.widths

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        converted = _restore_linear_attention(rename_keys(_without_drafts(text), cls.names))
        for name in converted:
            if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
                converted[name] = converted[name] - 1  # the host adds it
        if vision:
            tower = qwen_vl.convert_tower(vision, qwen_vl.QWEN3_VISION_NAMES)
            converted |= {f"model.{name}": tensor for name, tensor in tower.items()}
        return converted

    @classmethod
    def vision_width(cls, weights, vision):
        if not qwen_vl.is_qwen3_tower(vision, deepstack=False):
            return None
        return width_of(weights), qwen_vl.output_width(vision)


def _without_drafts(weights: Weights) -> Weights:
    """Returns the weights without the layers that predict further tokens (`nextn`)."""
    drafts = tuple({name.split("nextn.")[0] for name in weights if ".nextn." in name})
    return {name: tensor for name, tensor in weights.items() if not name.startswith(drafts)}


def _restore_linear_attention(weights: Weights) -> Weights:
    """Undoes the converter's changes to linear attention, under the host's names.

    The file stores -exp(A_log) for A_log, the convolution without its dimension of size 1, and the
    value heads, where a key head has several, in another order: the first one of every key head,
    then the second of every key head, and so on.
    """
    first = LINEAR.format(0)
    heads, width = len(weights[f"{first}.A_log"]), len(weights[f"{first}.norm.weight"])
    key_rows = (len(weights[f"{first}.in_proj_qkv.weight"]) - heads * width) // 2
    per_key = heads * width // key_rows  # value heads of a key head
    # the file's index of each head of the model
    order = torch.arange(heads).view(per_key, -1).t().flatten()
    value_rows = (width * order[:, None] + torch.arange(width)).flatten()
    qkv_rows = torch.cat([torch.arange(2 * key_rows), 2 * key_rows + value_rows])
    rows = {
        "A_log": order, "dt.bias": order, "in_proj_a.weight": order, "in_proj_b.weight": order,
        "in_proj_z.weight": value_rows, "in_proj_qkv.weight": qkv_rows, "conv1d.weight": qkv_rows
    }
    restored = {}
    for name, tensor in weights.items():
        part = name.rpartition("linear_attn.")[2]
        if per_key > 1 and part in rows:
            tensor = take_rows(tensor, rows[part])
        elif per_key > 1 and part == "out_proj.weight":
            tensor = _reorder_columns(tensor, per_key, heads // per_key)
        if part == "A_log":
            tensor = tensor.neg().log()
        elif part == "conv1d.weight":
            tensor = dense(tensor).unsqueeze(1)
        restored[name.replace("linear_attn.dt.bias", "linear_attn.dt_bias")] = tensor
    return restored


def _reorder_columns(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Transposes the columns from (outer, inner, n) to (inner, outer, n); packed bytes stay put."""
    rows, columns = tensor.shape
    if is_packed(tensor) and len(packed_tensors(tensor)) == 1:
        packed_format = tensor.params.format
        if columns % packed_format.block_length == 0:
            reordered = ColumnGroups.of(packed_format, columns, outer, inner)
            return packed_tensor(reordered, tensor._qdata, (rows, columns), tensor.dtype)
    return dense(tensor).view(rows, outer, inner, -1).transpose(1, 2).reshape(rows, columns)
