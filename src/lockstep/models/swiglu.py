"""SwiGLU on GPUs: each way one Triton kernel, which reads and writes every number once.

What PyTorch's compiler makes of the backward pass reads its inputs once for each half of the gradient.

Shape legend: t tokens, f inner width of the MLP.
"""

import torch
from torch import Tensor

from lockstep.models.ops import runs_triton


def has_kernel(inner: Tensor) -> bool:
    """Tell whether the kernels take a tensor: where they are, and not in float64."""
    return runs_triton(inner.device) and inner.dtype != torch.float64


def swiglu(inner: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., f], for inner [..., 2 f], which holds the gate's columns first.

    Computed in float32 and rounded once, forward and backward. Backward keeps the input only.
    """
    result: Tensor = _forward(inner)
    return result


@torch.library.custom_op("lockstep::swiglu", mutates_args=())
def _forward(inner: Tensor) -> Tensor:
    from lockstep.models import swiglu_kernels

    inner = inner.contiguous()
    result = inner.new_empty(*inner.shape[:-1], inner.shape[-1] // 2)
    swiglu_kernels.forward(inner, result)
    return result


@_forward.register_fake
def _(inner: Tensor) -> Tensor:
    return inner.new_empty(*inner.shape[:-1], inner.shape[-1] // 2)


@torch.library.custom_op("lockstep::swiglu_backward", mutates_args=())
def _backward(inner: Tensor, grad: Tensor) -> Tensor:
    from lockstep.models import swiglu_kernels

    inner, grad = inner.contiguous(), grad.contiguous()
    result = inner.new_empty(inner.shape)
    swiglu_kernels.backward(inner, grad, result)
    return result


@_backward.register_fake
def _(inner: Tensor, grad: Tensor) -> Tensor:
    return inner.new_empty(inner.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
    (inner,) = ctx.saved_tensors  # type: ignore[attr-defined]
    result: Tensor = _backward(inner, grad)
    return result


_forward.register_autograd(_gradient, setup_context=_keep)
