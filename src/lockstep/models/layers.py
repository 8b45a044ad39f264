"""Parameter holders that the blocks of the model share."""

import torch
from torch import Tensor, nn

from lockstep.models.ops import embedding, linear


class Linear(nn.Module):
    """A weight [o, h] and perhaps a bias [o]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None

    def product(self, x: Tensor) -> Tensor:
        """Return the product [..., o] without the bias, for callers that add it together with something else."""
        return linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return product plus bias [..., o]."""
        return linear(x, self.weight, self.bias)


class Table(nn.Module):
    """A table of embeddings [rows, h]."""

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [b, s, h] of ids [b, s]."""
        return embedding(ids, self.weight)


def required(value: int | None) -> int:
    """Return a size that the resolved config always has."""
    assert value is not None, "the model config is not resolved"
    return value
