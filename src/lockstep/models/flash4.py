"""Attention by FlashAttention-4, whose package compiles a kernel for each shape when it is first used.

Its functions become operations of PyTorch here, so that compiled layers hold them as they hold PyTorch's own kernels.

Shape legend: b batch, s keys, q queries, n query heads, g key/value groups, d head dim, v channels of a value. Where
segments are given, b and the sequence are one dimension.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MODULE = "flash_attn.cute.interface"


def is_installed() -> bool:
    """Tell whether the package flash-attn-4 is there."""
    return (
        importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None
    )


@cache
def _package() -> Any:
    # Said once for each kernel, of an argument that it does not need.
    warnings.filterwarnings("ignore", message="Argument .* cannot be converted to a JitArgument")
    return importlib.import_module(_MODULE)


def flash4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_begins: Tensor | None,
    key_begins: Tensor | None,
    queries: int,
    keys: int,
    scale: float,
) -> Tensor:
    """Return softmax(scale query key^T) value, [b, q, n, v], for query [b, q, n, d], key [b, s, g, d], value [.., v].

    Causal, and the last query sees the last key. ``query_begins`` and ``key_begins`` (int32) are where segments begin
    whose longest have so many queries and keys. Widths of heads are multiples of 64.
    """
    result: Tensor = _forward(query, key, value, query_begins, key_begins, queries, keys, scale)[0]
    return result


@torch.library.custom_op("lockstep::flash4_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_begins: Tensor | None,
    key_begins: Tensor | None,
    queries: int,
    keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the log-sum of exponentials of each query's scores, float32 [b, n, q] or [n, q]."""
    found = _package()._flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=query_begins,
        cu_seqlens_k=key_begins,
        max_seqlen_q=None if query_begins is None else queries,
        max_seqlen_k=None if key_begins is None else keys,
        softmax_scale=scale,
        causal=True,
        return_lse=True,
    )
    return found[0], found[1]


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    result = query.new_empty(*query.shape[:-1], value.shape[-1])
    of_heads = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    return result, query.new_empty(of_heads, dtype=torch.float32)


@torch.library.custom_op("lockstep::flash4_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    log_sum: Tensor,
    query_begins: Tensor | None,
    key_begins: Tensor | None,
    queries: int,
    keys: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous."""
    found = _package()._flash_attn_bwd(
        query,
        key,
        value,
        result,
        grad,
        log_sum,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=query_begins,
        cu_seqlens_k=key_begins,
        max_seqlen_q=None if query_begins is None else queries,
        max_seqlen_k=None if key_begins is None else keys,
        dq=query.new_empty(query.shape),
        dk=key.new_empty(key.shape),
        dv=value.new_empty(value.shape),
    )
    return found[0], found[1], found[2]


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, query_begins, key_begins, *ctx.sizes = inputs
    ctx.save_for_backward(query, key, value, *output, query_begins, key_begins)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, result, log_sum, query_begins, key_begins = ctx.saved_tensors
    found = _backward(grad, query, key, value, result, log_sum, query_begins, key_begins, *ctx.sizes)
    return *found, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
