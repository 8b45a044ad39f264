"""Triton kernels of SwiGLU. Importing this module needs Triton, which PyTorch's builds for GPUs bring along.

Tensors are contiguous: inner [t, 2 f], the gate's columns first, its gradient alike; result and grad [t, f].
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns that a program holds at a time


def forward(inner: Tensor, result: Tensor) -> None:
    """Put silu(gate) * up into the result."""
    columns = result.shape[-1]
    grid = (result.numel() // columns, triton.cdiv(columns, _BLOCK))
    _swiglu[grid](inner, result, columns, block=_BLOCK)


def backward(inner: Tensor, grad: Tensor, result: Tensor) -> None:
    """Put the gradient of inner into the result, for the gradient of silu(gate) * up."""
    columns = grad.shape[-1]
    _swiglu_backward[(grad.numel() // columns, triton.cdiv(columns, _BLOCK))](
        inner, grad, result, columns, block=_BLOCK
    )


@triton.jit
def _swiglu(inner, result, columns, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = inner + 2 * row * columns + column
    gate = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    up = tl.load(place + columns, mask=column < columns, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(result + row * columns + column, product.to(result.dtype.element_ty), mask=column < columns)


@triton.jit
def _swiglu_backward(inner, grad, result, columns, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = 2 * row * columns + column
    gate = tl.load(inner + place, mask=column < columns, other=0.0).to(tl.float32)
    up = tl.load(inner + place + columns, mask=column < columns, other=0.0).to(tl.float32)
    given = tl.load(grad + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = given * up * share * (1.0 + gate * (1.0 - share))
    of_up = given * gate * share
    tl.store(result + place, of_gate.to(result.dtype.element_ty), mask=column < columns)
    tl.store(result + place + columns, of_up.to(result.dtype.element_ty), mask=column < columns)
