"""Triton kernels of the cross entropy: one pass over low-precision logits each way, in float32 arithmetic.

Separate operations would write and read float32 copies of the logits eight times. Importing this module needs Triton,
which PyTorch's builds for GPUs bring along. A logit's address is int64: logits may have more than 2^31 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits of one row that a program holds at a time


def log_sums(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) of each row of logits [t, v], in float32 [t]; rows may be strided."""
    result = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _log_sums[(logits.shape[0],)](logits, result, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=8)
    return result


def put_gradients(logits: Tensor, log_sum: Tensor, labels: Tensor, grad: Tensor) -> None:
    """Put the gradient of logits [t, v] in their place, for the gradient [t] of the losses.

    A label [t] that is no column of the logits has its logit elsewhere.
    """
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], _BLOCK))
    _put_gradients[grid](logits, log_sum, labels, grad, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=8)


@triton.jit
def _log_sums(logits, result, vocab, stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest = -float("inf")
    total = 0.0
    for first in range(0, vocab, block):
        column = first + tl.arange(0, block)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), axis=0)
        highest = above
    tl.store(result + row, tl.log(total) + highest)


@triton.jit
def _put_gradients(logits, log_sum, labels, grad, vocab, stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = logits + row * stride + column
    x = tl.load(place, mask=column < vocab, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(log_sum + row))
    gradient = tl.where(column == tl.load(labels + row), share - 1.0, share) * tl.load(grad + row)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < vocab)
