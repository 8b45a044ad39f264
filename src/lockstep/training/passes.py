"""Forward and backward passes over the micro-batches of a batch, on a whole model or on the stages of a pipeline.

Shapes: m micro-batches, b samples of a micro-batch, s tokens of a sample.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from lockstep.models import DropoutStreams
from lockstep.models.ops import widened
from lockstep.models.router import RouterLosses
from lockstep.parallel import Axis
from lockstep.parallel.fsdp import add_up_gradients, release
from lockstep.training.feed import Batch
from lockstep.training.routing import Routing

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes the loss sum and the number of valid tokens of a micro-batch; returns what is differentiated."""


class Passes(Protocol):
    """Runs the micro-batches of one data-parallel process.

    Both methods return the loss sum and the valid tokens of each micro-batch [m, 2], at least FP32, on all processes
    that work on them. Training adds a column for each loss of the routers that `routing` names.
    """

    dropout: DropoutStreams | None
    routing: Routing

    def train(
        self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0
    ) -> torch.Tensor:
        """Run forward and backward passes; gradients add up where the optimizer collects them.

        `router_weight` is what a unit of a router's loss counts in what is differentiated.
        """

    def evaluate(self, batch: Batch, micro_batch_size: int) -> torch.Tensor:
        """Run forward passes without dropout."""


class WholePasses:
    """Passes of a model all of whose layers are on this process: one micro-batch after the other.

    Sharded gradients are added up over processes in the last backward pass only where ``sync_once``. ``prepare`` is
    called before the passes of a batch. ``given`` is what the model is given to draw from, by default ``dropout``.
    """

    def __init__(
        self,
        model: nn.Module,
        dropout: DropoutStreams | None = None,
        replicas: Axis | None = None,
        sync_once: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.dropout = self.given = dropout
        self._sync_once = sync_once
        self._prepare = prepare
        self.routing = Routing(model, replicas or Axis())

    def train(
        self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0
    ) -> torch.Tensor:
        """Run forward and backward passes; see ``Passes``."""
        self.model.train()
        if self._prepare is not None:
            self._prepare()
        sums: list[torch.Tensor] = []
        count = len(batch) // micro_batch_size
        for micro_batch in batch.split(micro_batch_size):
            add_up_gradients(self.model, not self._sync_once or len(sums) == count - 1)
            noted = self.routing.begin(router_weight)
            loss_sum, tokens = self.loss(micro_batch, self.given, noted)
            objective(loss_sum, tokens).backward()
            sums.append(torch.stack([loss_sum.detach(), tokens, *self.routing.means(noted)]))
        self.routing.finish()
        release(self.model)
        return torch.stack(sums)

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro_batch_size: int) -> torch.Tensor:
        """Run forward passes without dropout; see ``Passes``."""
        self.model.eval()
        if self._prepare is not None:
            self._prepare()
        sums = [torch.stack(self.loss(part, None)) for part in batch.split(micro_batch_size)]
        release(self.model)
        return torch.stack(sums)

    def loss(
        self, batch: Batch, dropout: DropoutStreams | None, noted: RouterLosses | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the forward pass of a micro-batch; return the sum of its losses and its valid tokens."""
        aside = {} if noted is None else {"router_losses": noted}
        losses = self.model(
            batch.tokens,
            batch.position_ids,
            batch.labels,
            document_ids=batch.document_ids,
            rotary_positions=batch.rotary_positions,
            dropout=dropout,
            **aside,
        )  # [b, s]
        return masked_sum(losses, batch.loss_mask, batch.valid_tokens)


def masked_sum(
    losses: torch.Tensor, loss_mask: torch.Tensor, valid_tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses [b, s] of valid tokens, and their number (scalars, at least FP32).

    ``valid_tokens`` [b] are the numbers of valid tokens of whole samples where the losses are of parts of them.
    """
    mask = loss_mask.to(widened(losses).dtype)
    return (losses * mask).sum(), (mask if valid_tokens is None else valid_tokens.to(mask.dtype)).sum()
