"""What may look on while a step is taken."""

from collections.abc import Sequence
from typing import Literal

import torch

from lockstep.training.feed import Batch

Moment = Literal["reduced", "clipped"]


class Observer:
    """Called by a step and its optimizer with what they work on; every method does nothing unless it is overridden.

    Nothing that is shown may be changed, and tensors are valid during the call only.
    """

    def begin(self, batch: Batch, micro_batch_size: int, lr: float, weight_decay: float) -> None:
        """A step begins on this process's part of a global batch."""

    def loss(self, loss_sum: torch.Tensor, tokens: torch.Tensor, value: torch.Tensor) -> None:
        """The loss of a micro-batch is known: its sum, its valid tokens, and what is differentiated."""

    def gradients(self, moment: Moment, grads: Sequence[torch.Tensor]) -> None:
        """The gradients of the main weights are whole and unscaled, or clipped."""
