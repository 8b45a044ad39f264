"""The layouts that a number of GPUs allows: sizes of the axes and what is shared out over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.config import ConfigContainer

Changes = dict[str, Any]
"""Settings of the config tree by dotted path."""

_TP = "model.tensor_model_parallel_size"
_SP = "model.sequence_parallel"
_SHARDED = "ddp.use_distributed_optimizer"


@dataclass(frozen=True)
class Layout:
    """Processes along each axis; together they are all processes of a run."""

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    sharded_optimizer: bool = False

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.tp * self.dp

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tp

    @property
    def changes(self) -> Changes:
        """The settings that ask for this layout, given the processes."""
        return {_TP: self.tp, _SP: self.sequence_parallel, _SHARDED: self.sharded_optimizer}

    def __str__(self) -> str:
        parts = [f"TP{self.tp}" + ("+SP" if self.sequence_parallel else "")] if self.tp > 1 else []
        if self.dp > 1:
            parts.append(("sharded " if self.sharded_optimizer else "") + f"DP{self.dp}")
        return " x ".join(parts) or "one process"


def layout_of(config: ConfigContainer, processes: int) -> Layout:
    """Return the layout that a resolved configuration asks for."""
    tp = config.model.tensor_model_parallel_size
    dp = processes // tp
    return Layout(tp, dp, config.model.sequence_parallel, dp > 1 and config.ddp.use_distributed_optimizer)


def layouts_for(processes: int) -> Iterator[Layout]:
    """Yield all layouts of so many processes that spare memory where it costs nothing, least model parallelism first.

    Sequence parallelism comes with tensor parallelism, and a sharded optimizer with data parallelism. A model may not
    divide into some of them.
    """
    for tp in _divisors(processes):
        dp = processes // tp
        yield Layout(tp, dp, sequence_parallel=tp > 1, sharded_optimizer=dp > 1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
