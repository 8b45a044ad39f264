"""Hooks that concern the processes of a run as such: equal weights where they should be equal, and time-outs."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from lockstep.errors import CommonError
from lockstep.models.init import Fingerprint
from lockstep.parallel import Axis, Mesh
from lockstep.parallel.plan import is_expert
from lockstep.training.hooks import Hook, IterationReport


class ReplicaCheck(Hook):
    """Compares the weights of the processes that should have the same, after every ``interval`` iterations."""

    def __init__(self, model: nn.Module, mesh: Mesh, interval: int) -> None:
        self._model = model
        self._mesh = mesh
        self._interval = interval

    def needs_state(self, iteration: int) -> bool:
        """Tell whether it is time."""
        return iteration % self._interval == 0

    def after_step(self, report: IterationReport) -> None:
        """Compare when it is time.

        Raises:
            CommonError: weights differ, on all processes; names one with the first parameter that differs.
        """
        if not self.needs_state(report.iteration):
            return
        findings: list[str | None] = [None] * self._mesh.world.size
        dist.all_gather_object(findings, self._difference(), group=self._mesh.world.group)
        for rank, finding in enumerate(findings):
            if finding is not None:
                raise CommonError(f"iteration {report.iteration}: the weights of rank {rank} differ from {finding}")

    def _difference(self) -> str | None:
        """Return from which process this one differs, and where first; None where it does not."""
        state = self._model.state_dict()
        mesh, experts = self._mesh, [name for name in state if is_expert(name)]
        if not (mesh.experts_apart and experts):
            return self._difference_of(state, mesh.replicas)
        own = {name: state.pop(name) for name in experts}
        return self._difference_of(state, mesh.replicas) or self._difference_of(own, mesh.expert_replicas)

    def _difference_of(self, state: dict[str, torch.Tensor], replicas: Axis) -> str | None:
        prints = Fingerprint()
        for name, tensor in state.items():
            prints.add(name, tensor)
        found = prints.result()
        names = [name for name in found if name != "all"]
        # The 64 bits of a digest, one fewer, fit a number with a sign.
        digests = torch.tensor([int(found[name]["sha256"], 16) >> 1 for name in names])
        device = next(self._model.parameters()).device
        differs = replicas.stacked(digests.to(device)).cpu()[0] != digests
        if not differs.any():
            return None
        first = dist.get_global_rank(replicas.group, 0) if replicas.group is not None else 0
        return (
            f"those of rank {first}, first in {names[int(differs.nonzero()[0])]}, and should be equal; the "
            "update or the exchange of gradients went wrong: go on from a checkpoint before it"
        )


class TimeoutHook(Hook):
    """Changes the time after which collectives fail, when the first iteration is done."""

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        self._mesh = mesh
        self._timeout = timeout
        self._set = False

    def after_step(self, report: IterationReport) -> None:
        """Set the time once."""
        if not self._set:
            self._mesh.set_timeout(self._timeout)
            self._set = True
