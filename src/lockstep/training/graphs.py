"""Micro-batches as CUDA graphs: kernels of a small model are shorter than their launches, and a graph is one launch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch

from lockstep.config import ConfigContainer
from lockstep.config.experts import expert_layers
from lockstep.models import DropoutStreams
from lockstep.models.ops import matmul_mode
from lockstep.parallel import Mesh
from lockstep.parallel.buckets import GradientBuckets
from lockstep.training.attention import keeps_documents_apart
from lockstep.training.feed import Batch
from lockstep.training.passes import Objective, WholePasses
from lockstep.training.switch import Switch, decide

# Operations of a micro-batch above which its kernels outlast their launches; docs/performance.md has the measurement.
SMALL_OPERATIONS = 1e12
_EAGER_STEPS = 1  # which leave libraries with their handles and workspaces


def choose_graphs(config: ConfigContainer, device: torch.device, mesh: Mesh, operations: float) -> Switch:
    """Return whether micro-batches of so many floating-point operations become CUDA graphs.

    Raises:
        UserError: graphs are asked for where they do not work.
    """
    small = operations <= SMALL_OPERATIONS
    worth = small, f"micro-batches are {'small' if small else 'large'}: {operations:.1e} operations"
    obstacle = partial(_obstacle, config, device, mesh)
    return decide("run.cuda_graphs", config.run.cuda_graphs, "micro-batches", obstacle, worth)


def _obstacle(config: ConfigContainer, device: torch.device, mesh: Mesh) -> str | None:
    """Return where graphs do not work; None where they do."""
    model = config.model
    if device.type == "cpu":
        return "on a CPU"
    if mesh.world.size > 1:
        return "with several processes"
    if any(expert_layers(model)):
        return "with experts"
    if config.peft.scheme is not None:
        return "with adapters"
    if model.recompute_granularity is not None:
        return "with recomputation"
    if keeps_documents_apart(config):
        return "with documents apart"
    if config.mixed_precision.fp16:
        return "with a loss scale that changes"
    # Elsewhere the loss asks the GPU which labels are in a tile.
    if not config.mixed_precision.bf16 or matmul_mode(device, torch.bfloat16) != "native":
        return "without native BF16 products"
    return None


class Graph(Protocol):
    """What was captured, to be run again on what now lies in the same tensors."""

    def replay(self) -> None:
        """Run it."""


Capture = Callable[[Callable[[], torch.Tensor]], tuple[Graph, torch.Tensor]]
"""Takes a job; returns its graph and the tensor that the job returned, which the graph fills. Nothing has run yet."""


@dataclass(frozen=True)
class _Captured:
    batch: Batch
    graph: Graph
    sums: torch.Tensor

    def run(self, batch: Batch) -> torch.Tensor:
        for field in fields(Batch):
            kept, new = getattr(self.batch, field.name), getattr(batch, field.name)
            if kept is not None:
                kept.copy_(new)
        self.graph.replay()
        return self.sums.clone()


class GraphedPasses:
    """Runs the micro-batches of ``inner`` as graphs, after a first step without.

    A graph has the forward and backward pass of one micro-batch, and the addition of its gradients to ``gradients``:
    the first micro-batch of a step overwrites them, so it has a graph of its own. The kernels are those of the other
    steps, and the random numbers too.
    """

    def __init__(self, inner: WholePasses, gradients: GradientBuckets, capture: Capture | None = None) -> None:
        self._inner = inner
        self._gradients = gradients
        self._capture = capture or CudaCapture(inner.dropout)
        self._steps = 0
        self._captured: dict[tuple[int, int, bool], _Captured] = {}
        self.dropout = inner.dropout
        self.routing = inner.routing

    def train(
        self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0
    ) -> torch.Tensor:
        """Run forward and backward passes; see ``Passes``. The objective is the same for batches of the same size."""
        self._steps += 1
        if self._steps <= _EAGER_STEPS:
            return self._inner.train(batch, micro_batch_size, objective, router_weight)
        self._inner.model.train()
        sums = []
        for number, micro_batch in enumerate(batch.split(micro_batch_size)):
            key = (micro_batch_size, len(batch), number == 0)
            if key not in self._captured:
                self._captured[key] = self._captured_pass(micro_batch, objective, first=number == 0)
            sums.append(self._captured[key].run(micro_batch))
            self._gradients.arrived_all()
        return torch.stack(sums)

    def evaluate(self, batch: Batch, micro_batch_size: int) -> torch.Tensor:
        """Run forward passes without dropout; see ``Passes``."""
        return self._inner.evaluate(batch, micro_batch_size)

    def _captured_pass(self, micro_batch: Batch, objective: Objective, first: bool) -> _Captured:
        held = {field.name: getattr(micro_batch, field.name) for field in fields(Batch)}
        batch = Batch(**{name: value.clone() for name, value in held.items() if value is not None})

        def job() -> torch.Tensor:
            loss_sum, tokens = self._inner.loss(batch, self.dropout)
            grads = torch.autograd.grad(objective(loss_sum, tokens), self._gradients.params)
            self._gradients.put(grads, overwrite=first)
            return torch.stack([loss_sum.detach(), tokens])

        return _Captured(batch, *self._capture(job))


class CudaCapture:
    """Captures jobs, which may draw from some random streams, with one pool of memory for all."""

    def __init__(self, streams: DropoutStreams | None) -> None:
        self._streams = streams
        self._pool: Any = None

    def __call__(self, job: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Capture a job."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._streams.generators if self._streams is not None else ():
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self._pool):
            result = job()
        self._pool = graph.pool()
        return graph, result
