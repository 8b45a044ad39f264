"""Attention by fused kernels, whose memory grows with the sequence and not with its square.

Shape legend: b batch, s sequence (keys), q queries, n query heads, g key/value groups, d head dim, v channels of a
value where these are not d.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.models.flash4 import flash4
from lockstep.models.mask import CausalMask

Kernel = Literal["explicit", "cudnn", "flash", "flash4", "sdpa"]
"""`explicit` scores; cuDNN's kernel; those of FlashAttention-2, in PyTorch, and FlashAttention-4, a package; on a CPU
PyTorch's scaled_dot_product_attention."""

_ALIGNMENT = 8  # channels


def fused_attention(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, scale: float | None
) -> Tensor:
    """Return softmax(scale query key^T) value, [b, q, n, v], for query [b, q, n, d], key [b, s, g, d], value [.., v].

    The scale is 1 / sqrt(d) unless it is given. Scores and probabilities are not rounded in between.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kernel == "cudnn":
        return _cudnn(query, key, value, mask, scale)
    of_run = {"flash": _flash, "flash4": _flash4, "sdpa": _sdpa}[kernel]
    parts, first = [], 0
    for run in mask.runs:
        part, seen = slice(first, first + len(run)), slice(0, run.stop)
        parts.append(of_run(query[:, part], key[:, seen], value[:, seen], mask, run, scale))
        first += len(run)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, scale: float) -> Tensor:
    if mask.document_ids is not None or len(mask.runs) > 1:
        raise ValueError("cuDNN's attention takes whole sequences of one document only")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    keeps = torch.is_grad_enabled()
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, keeps, 0.0, True, False, scale=scale
    )
    result: Tensor = found[0].transpose(1, 2)
    return result


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, run: range, scale: float) -> Tensor:
    """Attend by FlashAttention-2; heads are filled up to one width that it takes."""
    width = value.shape[-1]
    padded = -(-max(query.shape[-1], width) // _ALIGNMENT) * _ALIGNMENT
    query, key, value = (F.pad(x, (0, padded - x.shape[-1])) for x in (query, key, value))
    return _from_last_keys(_flash2, query, key, value, mask, run, scale)[..., :width]


def _flash2(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    *segments, scale = rest
    result: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *segments, 0.0, True, False, scale=scale
    )[0]
    return result


def _flash4(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, run: range, scale: float) -> Tensor:
    return _from_last_keys(flash4, query, key, value, mask, run, scale)


def _from_last_keys(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask,
    run: range,
    scale: float,
) -> Tensor:
    """Attend from the last len(run) positions of the keys; causal for these kernels is that the last query sees all."""
    batch, queries = query.shape[:2]
    query_begins = key_begins = None
    if mask.document_ids is not None:
        segments = mask.segments(run)
        query_begins, key_begins = segments.queries, segments.keys
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    result = attend(query, key, value, query_begins, key_begins, queries, run.stop, scale)
    return result.reshape(batch, queries, *result.shape[-2:])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, run: range, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    whole = mask.document_ids is None and run.start == 0
    seen = None if whole else ~mask.hidden_of(run)[:, None]
    result = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=whole,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2)
