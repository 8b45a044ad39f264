"""LayerNorm and RMSNorm: computed in float32, rounded once to the dtype of the input."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lockstep.config.model import ModelConfig
from lockstep.models.ops import widened


class Norm(nn.Module):
    """Normalise the last dimension, of `size` channels, as `config.normalization` says."""

    def __init__(self, config: ModelConfig, size: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.size = size
        self.epsilon = config.layernorm_epsilon
        self.centered = config.normalization == "LayerNorm"
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if self.centered else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., size], in the dtype of x."""
        weight: Tensor = self.weight + 1 if self.zero_centered_gamma else self.weight
        bias: Tensor | None = self.bias
        if x.device.type == "cpu":  # CPU kernels for low precision are slower and add up gradients in it
            x, weight, bias = widened(x), widened(weight), None if bias is None else widened(bias)
        if self.centered:
            y = F.layer_norm(x, (self.size,), weight, bias, self.epsilon)
        else:
            y = F.rms_norm(x, (self.size,), weight, self.epsilon)
        return y.to(self.weight.dtype)
