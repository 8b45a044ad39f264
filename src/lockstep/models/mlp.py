"""The feed-forward block and its activations.

Shape legend: b batch, s sequence, h hidden, f inner width of the MLP.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.models.layers import Linear, required
from lockstep.models.ops import given_gradient, widened
from lockstep.models.swiglu import has_kernel, swiglu

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "squared_relu": _squared_relu,
    "quick_gelu": _quick_gelu,
    "openai_gelu": _gelu_tanh,
}


def uses_fused_activation(config: ModelConfig) -> bool:
    """Tell whether bias and activation are one rounding, and gelu the tanh approximation, as in the fused kernels.

    There are fused kernels for gelu with a bias or a gate, and for gated silu and quick_gelu.
    """
    if not config.bias_activation_fusion:
        return False
    if config.activation_func == "gelu":
        return config.gated_linear_unit or config.add_bias_linear
    return config.gated_linear_unit and config.activation_func in ("silu", "quick_gelu")


class Nonlinearity:
    """Activation and gate of an MLP; a gated inner tensor holds the columns of the gate, then those of the rest."""

    def __init__(self, config: ModelConfig):
        self.gated = config.gated_linear_unit
        self.fused = uses_fused_activation(config)
        self.activation = _ACTIVATIONS[config.activation_func]
        self.swiglu = self.fused and self.gated and config.activation_func == "silu"
        if self.fused and config.activation_func == "gelu":
            self.activation = _gelu_tanh

    def __call__(self, inner: Tensor, bias: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """Return the activation [..., f] of the inner tensor plus bias, times a weight for each row if given."""
        if self.swiglu and bias is None and weights is None and has_kernel(inner):
            return swiglu(inner)
        if self.fused and torch.compiler.is_compiling():  # which decides itself what is kept and what is fused
            result = _gated_activation(_biased(inner, bias), self.activation, self.gated)
            return (result if weights is None else result * widened(weights)[..., None]).to(inner.dtype)
        if self.fused:
            return _FusedActivation.apply(inner, bias, weights, self.activation, self.gated)
        result = self._unfused(inner if bias is None else inner + bias)
        return result if weights is None else (result * weights[..., None]).to(inner.dtype)

    def _unfused(self, inner: Tensor) -> Tensor:
        if not self.gated:
            return _rounded_once(self.activation, inner)
        gate, up = inner.chunk(2, dim=-1)
        return _rounded_once(self.activation, gate) * up


class MLP(nn.Module):
    """linear_fc1, activation, linear_fc2, of inner width `inner`, by default that of the model's MLPs.

    A gated linear_fc1 holds the rows of the gate, then those of the rest.
    """

    def __init__(self, config: ModelConfig, *, inner: int | None = None, dtype: torch.dtype, device: torch.device):
        super().__init__()
        hidden, inner = required(config.hidden_size), inner or required(config.ffn_hidden_size)
        self.nonlinearity = Nonlinearity(config)
        width = 2 * inner if config.gated_linear_unit else inner
        self.linear_fc1 = Linear(hidden, width, bias=config.add_bias_linear, dtype=dtype, device=device)
        self.linear_fc2 = Linear(inner, hidden, bias=config.add_bias_linear, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output [b, s, h] for x [b, s, h], and its bias [h], not yet added."""
        inner = self.nonlinearity(self.linear_fc1.product(x), self.linear_fc1.bias)
        return self.linear_fc2.product(inner), self.linear_fc2.bias


def _rounded_once(activation: Activation, x: Tensor) -> Tensor:
    return activation(widened(x)).to(x.dtype)


class _FusedActivation(torch.autograd.Function):
    """Bias, activation, gate and weight in float32, rounded once, forward and backward; keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weights: Tensor | None, activation: Activation, gated: bool
    ) -> Tensor:
        ctx.save_for_backward(x, bias, weights)
        ctx.activation, ctx.gated = activation, gated
        result = _gated_activation(_biased(x, bias), activation, gated)
        return (result if weights is None else result * widened(weights)[..., None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, bias, weights = ctx.saved_tensors
        with torch.enable_grad():
            total = _biased(x, bias).detach().requires_grad_()
            result = _gated_activation(total, ctx.activation, ctx.gated)
        grad, grad_weights = widened(grads[0]), None
        if weights is not None:
            grad_weights = (result.detach() * grad).sum(dim=-1).to(weights.dtype)
            grad = grad * widened(weights)[..., None]
        with torch.enable_grad():
            objective = given_gradient(result, grad.to(result.dtype))
        (grad,) = torch.autograd.grad(objective, total)
        grad_x = grad.to(x.dtype)
        grad_bias = None if bias is None else grad_x.flatten(0, -2).sum(dim=0)
        return grad_x, grad_bias, grad_weights, None, None


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return widened(x) if bias is None else widened(x) + widened(bias)


def _gated_activation(x: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return activation(x)
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up
