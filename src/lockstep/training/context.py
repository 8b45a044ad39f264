"""Passes of one of several context-parallel processes.

Shapes: m micro-batches.
"""

import torch

from lockstep.parallel.context import SequencePart
from lockstep.parallel.mesh import Axis
from lockstep.training.feed import Batch
from lockstep.training.passes import Objective, Passes


class ContextPasses:
    """Hands ``inner`` this process's part of every sequence; what it finds are parts of the losses of ``cp``."""

    def __init__(self, inner: Passes, cp: Axis) -> None:
        self._inner = inner
        self._cp = cp
        self._sequence = SequencePart(cp)
        self.dropout = inner.dropout
        self.routing = inner.routing

    def train(
        self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0
    ) -> torch.Tensor:
        """Run forward and backward passes; see ``Passes``."""
        return self._whole(self._inner.train(self._part(batch), micro_batch_size, objective, router_weight))

    def evaluate(self, batch: Batch, micro_batch_size: int) -> torch.Tensor:
        """Run forward passes without dropout; see ``Passes``."""
        return self._whole(self._inner.evaluate(self._part(batch), micro_batch_size))

    def _part(self, batch: Batch) -> Batch:
        return batch.at(self._sequence.positions(batch.tokens.shape[1], batch.tokens.device))

    def _whole(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up all sums [m, 2 + n] but the numbers of valid tokens, which are already those of whole sequences."""
        losses, tokens, of_routers = sums.tensor_split((1, 2), dim=1)
        losses = self._cp.sum_(losses.contiguous())
        if of_routers.shape[1]:
            of_routers = self._cp.sum_(of_routers.contiguous())
        return torch.cat([losses, tokens, of_routers], dim=1)
