"""Attention on a CPU, through the host's own way to choose another: `optimized_attention_override`.

The host's own on a CPU multiplies all queries with all keys, writes the scores to memory and reads
them several times. The slices below stay in the cache. In float32 torch's own attention is faster
than the host's, and the slices are where oneDNN multiplies faster than torch.
"""
import functools
from collections.abc import Callable

import torch
from comfy.ldm.modules.attention import attention_pytorch

from .. import kernels
from ..layers.product import needs_gradient
from . import linear as cpu_linear

SLICE_BYTES = 4 << 20  # of scores; each core has its part of a slice in its cache


def attention(host_attention: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
              attn_precision: torch.dtype | None = None, skip_reshape: bool = False,
              skip_output_reshape: bool = False, load: int = kernels.LATEST,
              **options) -> torch.Tensor:
    """Computes attention as the host's functions do, on a CPU faster.

    Args:
        host_attention: the host's choice; it computes what is not for here.
        query, key, value: (batch, tokens, heads * width), or with `skip_reshape`
            (batch, heads, tokens, width).
        heads: their number.
        mask, attn_precision: as the host's functions take them.
        skip_reshape: see the inputs.
        skip_output_reshape: return (batch, heads, tokens, width).
        load: number of the model's load, see `kernels.find`.
        options: further ones of the host's.

    Returns:
        (batch, tokens, heads * width) in the dtype of `query`, or see `skip_output_reshape`.
    """
    if not _in_slices(query, key, value, mask, attn_precision, options):
        is_float32 = query.device.type == "cpu" and query.dtype == torch.float32
        compute = attention_pytorch if is_float32 else host_attention
        return compute(query, key, value, heads, mask=mask, attn_precision=attn_precision,
                       skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
                       **options)
    if not skip_reshape:
        # some models have split the heads of the value already
        shape = query.shape[0], -1, heads, query.shape[-1] // heads
        query, key, value = (operand.reshape(shape).transpose(1, 2)
                             for operand in (query, key, value))
    scale = options.get("scale", query.shape[-1] ** -0.5)
    in_slices = attention_in_slices if query.dtype == torch.bfloat16 else attention_by_onednn
    out = in_slices(query, key, value, scale, load)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention_of_load(load: int) -> Callable[..., torch.Tensor]:
    """Returns `attention` for a model, see `kernels.find`."""
    return functools.partial(attention, load=load)


def is_own(override: object) -> bool:
    """Returns whether something is a result of `attention_of_load`."""
    return isinstance(override, functools.partial) and override.func is attention


def _in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: torch.Tensor | None, attn_precision: torch.dtype | None,
               options: dict) -> bool:
    """Returns whether `attention_in_slices` or `attention_by_onednn` computes an attention.

    The arguments are those of `attention`.
    """
    return (
        query.device.type == "cpu"
        and (query.dtype == torch.bfloat16
             or (query.dtype == torch.float32 and cpu_linear.takes(query)))
        and query.numel() > 0
        and key.numel() > 0
        and mask is None
        and attn_precision != torch.float32
        and not options.get("enable_gqa")
        and not torch.compiler.is_compiling()
        and not needs_gradient(query, key, value)
    )


def attention_in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        scale: float, load: int = kernels.LATEST) -> torch.Tensor:
    """Computes softmax(scale * query @ key.T) @ value, the scores in slices of `SLICE_BYTES`.

    Args:
        query: (batch, heads, N, width).
        key, value: (batch, heads, M, width); the width of `value` may be another.
        scale: of the scores.
        load: as `attention` takes it.

    Returns:
        (batch, heads, N, width of `value`) in the dtype of `query`, as the scores are.
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    tokens = query.shape[-2]
    query, key, value, flat_out = (tensor.reshape(-1, *tensor.shape[-2:])
                                   for tensor in (query, key, value, out))
    keys = key.transpose(1, 2)
    rows = max(1, SLICE_BYTES // (key.shape[1] * query.itemsize))
    heads_at_once, rows = max(1, rows // tokens), min(rows, tokens)
    scores = query.new_empty(heads_at_once * rows * key.shape[1])
    for first in range(0, len(query), heads_at_once):
        heads = slice(first, first + heads_at_once)
        for start in range(0, tokens, rows):
            part = query[heads, start:start + rows]
            shape = *part.shape[:2], key.shape[1]
            slice_scores = scores[:shape[0] * shape[1] * shape[2]].view(shape)
            torch.baddbmm(slice_scores, part, keys[heads], beta=0, alpha=scale, out=slice_scores)
            _softmax(slice_scores.view(-1, shape[-1]), load)
            torch.bmm(slice_scores, value[heads], out=flat_out[heads, start:start + rows])
    return out


def attention_by_onednn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        scale: float, load: int = kernels.LATEST) -> torch.Tensor:
    """Computes what `attention_in_slices` does, one head at a time.

    Args:
        query: (batch, heads, N, width); `cpu.linear` takes its dtype.
        key, value: as there.
        scale: of the scores.
        load: as `attention` takes it.

    Returns:
        As there.
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    tokens = query.shape[-2]
    rows = max(1, SLICE_BYTES // (key.shape[-2] * query.itemsize))
    heads = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (query, key, value, out))
    for head_query, head_key, head_value, head_out in zip(*heads):
        scaled_key, columns = (head_key * scale).contiguous(), head_value.t().contiguous()
        for start in range(0, tokens, rows):
            part = head_query[start:start + rows].contiguous()
            scores = cpu_linear.linear(part, scaled_key)
            _softmax(scores, load)
            head_out[start:start + rows] = cpu_linear.linear(scores, columns)
    return out


def _softmax(scores: torch.Tensor, load: int):
    """Replaces each row of scores (rows, keys) by its softmax."""
    run = kernels.find("softmax", scores.device, None, scores.dtype, load=load)
    if run is None:
        torch.softmax(scores, -1, out=scores)
    else:
        run(scores)
