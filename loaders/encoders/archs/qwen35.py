"""Qwen3.5, whose layers are linear attention (a gated delta rule) but for every fourth, with or
without its vision tower."""
import torch

from ....ops.formats.column_groups import ColumnGroups
from ....ops.packed_layout import is_packed, packed_tensor, packed_tensors
from ....ops.row_slicing import dense, take_rows
from ..arch import Arch, Weights, rename_keys
from . import qwen_vl
from ._decoder import DECODER_NAMES

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers.{{}}"
LINEAR = f"{LAYER}.linear_attn"


class Qwen35(Arch):
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
        marks = {
            "blk.0.ssm_a", "blk.0.ssm_alpha.weight", "blk.0.attn_qkv.weight",
            "blk.0.ffn_gate.weight"
        }
        return marks <= weights.keys() and weights["token_embd.weight"].shape[1] in cls.widths

    @classmethod
    def convert(cls, weights, metadata):
        text, vision = qwen_vl.split_vision(weights)
        out = _linear_attention_restored(rename_keys(_without_drafts(text), cls.names))
        for name in out:
            if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
                out[name] = out[name] - 1  # the host adds it
        if vision:
            visual = qwen_vl.tower(vision, qwen_vl.QWEN3_VISION_NAMES)
            out |= {f"model.{name}": tensor for name, tensor in visual.items()}
        return out

    @classmethod
    def vision_width(cls, weights, vision):
        if not qwen_vl.is_qwen3_tower(vision, deepstack=False):
            return None
        return weights["token_embd.weight"].shape[1], qwen_vl.width_given(vision)


def _without_drafts(weights: Weights) -> Weights:
    """The weights without the layers that guess further tokens (`nextn`), which the host has no use
    for."""
    drafts = tuple({name.split("nextn.")[0] for name in weights if ".nextn." in name})
    return {name: tensor for name, tensor in weights.items() if not name.startswith(drafts)}


def _linear_attention_restored(weights: Weights) -> Weights:
    """The weights of linear attention as before the conversion, under the host's names.

    The file has -exp(A_log) for A_log, the convolution without its dimension of size 1, and the
    value heads, where there are several to a key head, in another order: the first of each key
    head, then the second of each, and so on.
    """
    first = LINEAR.format(0)
    heads, width = len(weights[f"{first}.A_log"]), len(weights[f"{first}.norm.weight"])
    keys = (len(weights[f"{first}.in_proj_qkv.weight"]) - heads * width) // 2
    shared = heads * width // keys  # value heads to a key head
    # where each head of the model lies in the file
    order = torch.arange(heads).view(shared, -1).t().flatten()
    values = (width * order[:, None] + torch.arange(width)).flatten()
    mixed = torch.cat([torch.arange(2 * keys), 2 * keys + values])
    rows = {"A_log": order, "dt.bias": order, "in_proj_a.weight": order, "in_proj_b.weight": order,
            "in_proj_z.weight": values, "in_proj_qkv.weight": mixed, "conv1d.weight": mixed}
    out = {}
    for name, tensor in weights.items():
        part = name.rpartition("linear_attn.")[2]
        if shared > 1 and part in rows:
            tensor = take_rows(tensor, rows[part])
        elif shared > 1 and part == "out_proj.weight":
            tensor = _columns_reordered(tensor, shared, heads // shared)
        if part == "A_log":
            tensor = tensor.neg().log()
        elif part == "conv1d.weight":
            tensor = dense(tensor).unsqueeze(1)
        out[name.replace("linear_attn.dt.bias", "linear_attn.dt_bias")] = tensor
    return out


def _columns_reordered(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """The columns, seen as (outer, inner, n), as (inner, outer, n). Packed bytes stay where they
    are."""
    rows, columns = tensor.shape
    packed_format = (
        tensor.layout_cls.format if is_packed(tensor) and len(packed_tensors(tensor)) == 1 else None
    )
    if packed_format is None or columns % packed_format.block_length:
        return dense(tensor).view(rows, outer, inner, -1).transpose(1, 2).reshape(rows, columns)
    reordered = ColumnGroups.of(packed_format, columns, outer, inner)
    return packed_tensor(reordered, tensor._qdata, (rows, columns), tensor.dtype)
