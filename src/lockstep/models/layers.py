"""Parameter holders that the blocks of the model share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lockstep.models.ops import embedding, linear


class Linear(nn.Module):
    """A weight [o, h] and perhaps a bias [o].

    What is put into ``adapter`` takes input, product and weight, and returns what stands in place of the product. What
    is put into ``multiply`` takes input and weight, and returns the product; without it that is ``linear``.
    """

    adapter: nn.Module | None
    multiply: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None
        self.adapter = None

    def product(self, x: Tensor) -> Tensor:
        """Return the product [..., o] without the bias, for callers that add it together with something else."""
        return self.adapted(x, self.multiplied(x))

    def multiplied(self, x: Tensor) -> Tensor:
        """Return the product [..., o] of an input with the weight alone."""
        multiply = self.multiply or linear
        return multiply(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return product plus bias [..., o]."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def adapted(self, x: Tensor, product: Tensor) -> Tensor:
        """Return the product of x [..., h] as its adapter has it."""
        if self.adapter is None:
            return product
        changed: Tensor = self.adapter(x, product, self.weight)
        return changed


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
