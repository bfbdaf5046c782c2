"""Attention on a CPU, through the host's own way to choose another: `optimized_attention_override`.

The host's own on a CPU multiplies all queries with all keys, writes the scores to memory and reads
them several times. A kernel does it in one pass. Without it, bfloat16, and float32 where oneDNN
multiplies faster than torch, are computed in slices of the scores that stay in the cache.
"""
import functools
from collections.abc import Callable

import torch
from comfy.ldm.modules.attention import attention_pytorch

from .. import kernels
from . import cpu_linear
from .product import needs_gradient

SLICE_BYTES = 4 << 20  # of scores; each core has its part of a slice in its cache


def attention(host_attention: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
              attn_precision: torch.dtype | None = None, skip_reshape: bool = False,
              skip_output_reshape: bool = False, **options) -> torch.Tensor:
    """Computes attention as the host's functions do, on a CPU faster.

    Args:
        host_attention: the host's choice; it computes what is not for here.
        query, key, value: (batch, tokens, heads * width), or with `skip_reshape`
            (batch, heads, tokens, width). With the host's option `enable_gqa`, key and value may
            have fewer heads.
        heads: their number.
        mask, attn_precision: as the host's functions take them.
        skip_reshape: see the inputs.
        skip_output_reshape: return (batch, heads, tokens, width).
        options: further ones of the host's.

    Returns:
        (batch, tokens, heads * width) in the dtype of `query`, or see `skip_output_reshape`.
    """
    compute, in_heads = None, (query, key, value)
    if _is_for_here(query, key, value):
        if not skip_reshape:
            width = query.shape[-1] // heads
            # some models have split the heads of the value already
            in_heads = tuple(operand.reshape(*operand.shape[:2], -1, width).transpose(1, 2)
                             for operand in in_heads)
        compute = _choice(in_heads, mask, attn_precision, options)
    if compute is None:
        is_float32 = query.device.type == "cpu" and query.dtype == torch.float32
        compute = attention_pytorch if is_float32 else host_attention
        return compute(query, key, value, heads, mask=mask, attn_precision=attn_precision,
                       skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
                       **options)
    out = compute(*in_heads, options.get("scale", in_heads[0].shape[-1]**-0.5))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _is_for_here(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether something here may compute the attention of these inputs."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and 0 not in (query.numel(), key.numel(), value.numel())
        and not torch.compiler.is_compiling()
        and not needs_gradient(query, key, value)
    )


def _choice(in_heads: tuple[torch.Tensor, ...], mask: torch.Tensor | None,
            attn_precision: torch.dtype | None,
            options: dict) -> Callable[..., torch.Tensor] | None:
    """Returns what computes an attention: a function of query, key, value and scale; None: the
    host.

    Args:
        in_heads: query, key and value, (batch, heads, tokens, width).
        mask, attn_precision, options: as `attention` takes them.
    """
    query, key, _ = in_heads
    heads, has_groups = query.shape[1], options.get("enable_gqa", False)
    if heads % key.shape[1] or (heads != key.shape[1] and not has_groups):
        return None  # the host says what is wrong
    run = kernels.find("attention", query.device, None, query.dtype)
    if run is not None:
        addend = None if mask is None else _addend(mask, (*query.shape[:3], key.shape[2]))
        if mask is None or addend is not None:
            return functools.partial(attention_in_one_pass, run=run, mask=addend)
    if mask is not None or has_groups or attn_precision == torch.float32:
        return None
    if query.dtype == torch.bfloat16:
        return attention_in_slices
    if query.dtype == torch.float32 and cpu_linear.takes(query):
        return attention_by_onednn
    return None


def _addend(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Returns what a mask adds to scores of a shape (batch, heads, queries, keys), in float32; None
    where it is no mask for them."""
    if mask.ndim not in (2, 3, 4) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    mask = mask.reshape(mask.shape[0] if mask.ndim > 2 else 1, -1, *mask.shape[-2:])
    if any(size not in (1, whole) for size, whole in zip(mask.shape, shape)):
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.float().expand(shape)


def attention_in_one_pass(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                          run: Callable[..., None], mask: torch.Tensor | None) -> torch.Tensor:
    """Computes softmax(scale * query @ key.T + mask) @ value by a kernel.

    Args:
        query: (batch, heads, N, width).
        key: (batch, key heads, M, width); each of its heads serves as many of the query's.
        value: (batch, key heads, M, any width).
        scale: of the scores.
        run: of the kernel "attention".
        mask: (batch, heads, N, M), float32, or None.

    Returns:
        (batch, heads, N, width of `value`) in the dtype of `query`.
    """
    batch, heads, tokens, _ = query.shape
    out = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
    if scale < 0:
        query, scale = -query, -scale
    run(*(operand if operand.stride(-1) == 1 else operand.contiguous()
          for operand in (query, key, value)), mask, scale, out)
    return out


def attention_in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        scale: float) -> torch.Tensor:
    """Computes softmax(scale * query @ key.T) @ value, the scores in slices of `SLICE_BYTES`.

    Args:
        query: (batch, heads, N, width).
        key, value: (batch, heads, M, width); the width of `value` may be another.
        scale: of the scores.

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
            torch.softmax(slice_scores, -1, out=slice_scores)
            torch.bmm(slice_scores, value[heads], out=flat_out[heads, start:start + rows])
    return out


def attention_by_onednn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        scale: float) -> torch.Tensor:
    """Computes what `attention_in_slices` does, one head at a time.

    Args:
        query: (batch, heads, N, width); `cpu.linear` takes its dtype.
        key, value: as there.
        scale: of the scores.

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
            torch.softmax(scores, -1, out=scores)
            head_out[start:start + rows] = cpu_linear.linear(scores, columns)
    return out
