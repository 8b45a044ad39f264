"""The processes that save and load checkpoints together, and stop together, and how they come to one outcome."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lockstep.errors import CommonError, UserError
from lockstep.parallel import Mesh

_T = TypeVar("_T")


@dataclass(frozen=True)
class Peers:
    """All processes of a run, with a gloo group of their own.

    Saving in the background does not mix with training, and no GPU is waited for.

    A step that fails on one process fails on all: where it is the user's to mend, with one and the same error.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: Mesh, timeout: timedelta) -> "Peers":
        """Return the processes of a mesh; every one of them has to call this."""
        if mesh.world.group is None:
            return cls()
        return cls(mesh.world.size, mesh.world.rank, dist.new_group(backend="gloo", timeout=timeout))

    @property
    def leads(self) -> bool:
        """Whether this process does what only one does."""
        return self.rank == 0

    def everywhere(self, step: Callable[[], _T]) -> list[_T]:
        """Run a step on every process; return the results of all in the order of their ranks.

        Raises:
            UserError: the step failed somewhere.
        """
        if self.group is None:
            return [step()]
        outcome: tuple[bool, Any]
        own: BaseException | None = None
        try:
            outcome = True, step()
        except Exception as error:
            own = error
            unforeseen = f"process {self.rank}: {type(error).__name__}: {error}"
            outcome = False, str(error) if isinstance(error, UserError) else unforeseen
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.group)
        failed = [(rank, text) for rank, (fine, text) in enumerate(outcomes) if not fine]
        if own is not None and not isinstance(own, UserError):
            raise own  # A bug: with its traceback.
        if failed:
            raise CommonError(failed[0][1]) from own
        return [result for _, result in outcomes]

    def anywhere(self, flag: bool) -> bool:
        """Tell whether a flag is up on any process."""
        if self.group is None:
            return flag
        highest = torch.tensor(int(flag))
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return bool(highest)

    def seen_by_leader(self, flag: bool) -> bool:
        """Return the first process's flag on all."""
        return self.anywhere(flag and self.leads)

    def by_leader(self, step: Callable[[], _T]) -> _T:
        """Run a step on the first process only; return its result on all.

        Raises:
            UserError: the step failed.
        """
        return self.everywhere(lambda: step() if self.leads else None)[0]  # type: ignore[return-value]
