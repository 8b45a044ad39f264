"""The layouts that a number of GPUs allows: sizes of the axes and what is shared out over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.config import ConfigContainer
from lockstep.config.derive import model_processes

Changes = dict[str, Any]
"""Settings of the config tree by dotted path."""

_TP = "model.tensor_model_parallel_size"
_SP = "model.sequence_parallel"
_PP = "model.pipeline_model_parallel_size"
_CP = "model.context_parallel_size"
_SHARDED = "ddp.use_distributed_optimizer"
# How layers are shared out to one number of stages says nothing for another.
_OF_PIPELINES: Changes = {
    "model.virtual_pipeline_model_parallel_size": None,
    "model.num_layers_in_first_pipeline_stage": None,
    "model.num_layers_in_last_pipeline_stage": None,
    "model.account_for_embedding_in_pipeline_split": False,
    "model.account_for_loss_in_pipeline_split": False,
    "model.pipeline_model_parallel_layout": None,
}


@dataclass(frozen=True)
class Layout:
    """Processes along each axis; together they are all processes of a run.

    ``chunks`` are virtual pipeline stages; ``ep`` are those of cp and dp that share out experts.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    chunks: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    sharded_optimizer: bool = False

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.model_parallel * self.dp

    @property
    def model_parallel(self) -> int:
        """Processes that work on one micro-batch together."""
        return self.tp * self.pp * self.cp

    @property
    def replicas(self) -> int:
        """Processes that have the same weights, over which an optimizer can be sharded."""
        return self.cp * self.dp

    def changes(self, asked: "Layout") -> Changes:
        """Return the settings that ask for this layout, given the processes, where another was asked for."""
        sizes: Changes = {_TP: self.tp, _SP: self.sequence_parallel, _PP: self.pp, _CP: self.cp}
        sizes[_SHARDED] = self.sharded_optimizer
        return sizes if self.pp == asked.pp else {**sizes, **_OF_PIPELINES}

    def __str__(self) -> str:
        parts = [f"TP{self.tp}" + ("+SP" if self.sequence_parallel else "")] if self.tp > 1 else []
        if self.pp > 1:
            parts.append(f"PP{self.pp}" + (f" interleaved ({self.chunks})" if self.chunks > 1 else ""))
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        copies = [f"{axis}{size}" for axis, size in (("CP", self.cp), ("DP", self.dp)) if size > 1]
        if copies:
            parts.append(("sharded " if self.sharded_optimizer else "") + " x ".join(copies))
        return " x ".join(parts) or "one process"


def layout_of(config: ConfigContainer, processes: int) -> Layout:
    """Return the layout that a resolved configuration asks for."""
    m, dp = config.model, processes // model_processes(config)
    return Layout(
        tp=m.tensor_model_parallel_size,
        pp=m.pipeline_model_parallel_size,
        cp=m.context_parallel_size,
        dp=dp,
        chunks=m.virtual_pipeline_model_parallel_size or 1,
        ep=m.expert_model_parallel_size,
        sequence_parallel=m.sequence_parallel,
        sharded_optimizer=dp * m.context_parallel_size > 1 and config.ddp.use_distributed_optimizer,
    )


def layouts_for(processes: int, asked: Layout) -> Iterator[Layout]:
    """Yield all layouts of so many processes that spare memory where it costs nothing, least model parallelism first.

    Sequence parallelism comes with tensor parallelism, and a sharded optimizer where several processes have the same
    weights; expert parallelism stays as asked. A model may not divide into some of them.
    """
    for model_parallel in _divisors(processes):
        dp = processes // model_parallel
        for cp in _divisors(model_parallel):
            for pp in _divisors(model_parallel // cp):
                tp, chunks = model_parallel // cp // pp, asked.chunks if pp == asked.pp else 1
                yield Layout(tp, pp, cp, dp, chunks, asked.ep, sequence_parallel=tp > 1, sharded_optimizer=cp * dp > 1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
