"""The routers of a model over the micro-batches of a step: their losses, and the biases of their experts."""

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
        self._replicas = replicas
        self._noted: list[RouterLosses] = []
        self.names: tuple[str, ...] = ()
        self._layers = 0
        if isinstance(model, GPTModel):
            self.names = auxiliary_names(model.config)
            self._layers = sum(expert_layers(model.config))

    def begin(self, weight: float) -> RouterLosses | None:
        """Return what a forward pass notes its losses in, or None where this process has no router."""
        if not self._routers:
            return None
        self._noted.append(RouterLosses(weight))
        return self._noted[-1]

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
        for layer, router in self._routers.items():
            if router.expert_bias is not None:
                load = torch.stack([each.loads[layer] for each in noted if layer in each.loads]).sum(dim=0)
                router.move_bias(self._replicas.sum_(load))
