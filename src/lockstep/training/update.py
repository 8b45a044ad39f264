"""PyTorch's optimizers without its compiler, which each of them imports as soon as it is made.

The import keeps the compiler away from their methods, and takes nearly as long as that of PyTorch itself. Lockstep
compiles no optimizer: here the methods are PyTorch's own, as they are beneath.
"""

import inspect
from typing import Any

import torch
from torch import optim


class _Bare(optim.Optimizer):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters."""
        inspect.unwrap(optim.Optimizer.add_param_group)(self, param_group)


class AdamW(_Bare, optim.AdamW):
    """PyTorch's AdamW."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters."""
        return inspect.unwrap(optim.AdamW.step)(self, closure)


class SGD(_Bare, optim.SGD):
    """PyTorch's SGD."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters."""
        return inspect.unwrap(optim.SGD.step)(self, closure)
