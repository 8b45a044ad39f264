"""The routers of a model over the micro-batches of a step: their losses, and the biases of their experts."""

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.config.experts import auxiliary_names, expert_layers
from lockstep.models import GPTModel
from lockstep.models.ops import widened
from lockstep.models.router import Router, RouterLosses
from lockstep.parallel import Axis


class Routing:
    """Keeps what the routers of this process's layers note in each micro-batch of a step.

    ``names`` are the losses that the routers of the whole model add; none where no layer has experts. Processes of
    ``replicas`` have the same routers and other tokens.
    """

    def __init__(self, model: nn.Module, replicas: Axis) -> None:
        self._routers = {router.layer: router for router in model.modules() if isinstance(router, Router)}
        self._biased = [layer for layer, router in self._routers.items() if router.expert_bias is not None]
        self._replicas = replicas
        self._noted: list[RouterLosses] = []
        self.names: tuple[str, ...] = ()
        self._layers = 0
        if isinstance(model, GPTModel):
            self.names = auxiliary_names(model.config)
            self._layers = sum(expert_layers(model.config))

    def begin(self, weight: float) -> RouterLosses | None:
        """Return what a forward pass notes its losses in, or None where this process has no router."""
        noted = self.apart(weight)
        if noted is not None:
            self._noted.append(noted)
        return noted

    def apart(self, weight: float) -> RouterLosses | None:
        """Return the same for a pass that is to run again: it counts only by what ``add`` is given of it."""
        return RouterLosses(weight) if self._routers else None

    def loads(self, noted: RouterLosses | None) -> list[torch.Tensor]:
        """Return the loads that biases are moved by, of this process's routers in their order."""
        return [] if noted is None else [noted.loads[layer] for layer in self._biased]

    def add(self, loads: Sequence[torch.Tensor]) -> None:
        """Count a micro-batch with these loads."""
        noted = RouterLosses(0.0)
        noted.loads = dict(zip(self._biased, loads, strict=True))
        self._noted.append(noted)

    def means(self, noted: RouterLosses | None) -> list[torch.Tensor]:
        """Return this process's part of the mean over all layers with experts of each named loss, a scalar each."""
        if noted is None:
            return []
        weight = next(iter(self._routers.values())).weight
        zero = widened(torch.zeros((), dtype=weight.dtype, device=weight.device))
        found = [[loss for (of, _), loss in noted.losses.items() if of == name] for name in self.names]
        return [sum(losses, start=zero) / self._layers for losses in found]

    @torch.no_grad()
    def finish(self) -> None:
        """Move the biases of experts by the loads of the whole global batch, and forget what was noted."""
        noted, self._noted = self._noted, []
        for layer in self._biased:
            load = torch.stack([each.loads[layer] for each in noted if layer in each.loads]).sum(dim=0)
            self._routers[layer].move_bias(self._replicas.sum_(load))
