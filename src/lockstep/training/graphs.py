"""Micro-batches as CUDA graphs: where kernels are shorter than their launches, one launch for all of them.

Processes capture and run the same graphs in the same order. What they exchange within a micro-batch is in the graph, by
the process groups that exchange it without graphs; what they exchange once a step comes after the last graph.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.experts import evens_by_scaling, expert_layers
from lockstep.config.sharding import shards_weights
from lockstep.models import DropoutStreams, GPTModel
from lockstep.models.layers import required
from lockstep.models.moe import Expert, takes_grouped_products
from lockstep.models.ops import matmul_mode
from lockstep.parallel import Mesh
from lockstep.training.attention import keeps_documents_apart
from lockstep.training.feed import Batch
from lockstep.training.passes import Objective, WholePasses
from lockstep.training.precision import MainWeights
from lockstep.training.switch import Switch, decide

# Operations of a micro-batch above which its kernels outlast their launches; docs/performance.md has the measurements.
SMALL_OPERATIONS = 1e12
SMALL_LAYER_WITH_EXPERTS = 5e12  # the same for each layer of a model with experts

_EAGER_STEPS = 1  # which leave libraries with their handles, workspaces, connections and compiled code


def choose_graphs(config: ConfigContainer, device: torch.device, mesh: Mesh, operations: float) -> Switch:
    """Return whether micro-batches of so many floating-point operations become CUDA graphs.

    Raises:
        UserError: graphs are asked for where they do not work.
    """
    obstacle = partial(_obstacle, config, device, mesh)
    worth = _worth(config, mesh, operations)
    chosen = decide("run.cuda_graphs", config.run.cuda_graphs, "micro-batches", obstacle, worth)
    overlaps = mesh.replicas.size > 1 and (config.ddp.overlap_grad_reduce or config.ddp.overlap_param_gather)
    if not (chosen.on and overlaps):
        return chosen
    # A bucket that is started by its last gradient would be started by a hook, which a graph does not call.
    return replace(chosen, reason=f"{chosen.reason}; gradients and weights cross the processes between steps only")


def _worth(config: ConfigContainer, mesh: Mesh, operations: float) -> tuple[bool, str]:
    """Return whether ``auto`` takes graphs where they work, and why."""
    has_experts = any(expert_layers(config.model))
    if mesh.world.size > 1 and not has_experts:
        return False, "not measured on several processes without experts"
    most = SMALL_LAYER_WITH_EXPERTS * required(config.model.num_layers) if has_experts else SMALL_OPERATIONS
    small = operations <= most
    return small, f"micro-batches are {'small' if small else 'large'}: {operations:.1e} operations"


def _obstacle(config: ConfigContainer, device: torch.device, mesh: Mesh) -> str | None:
    """Return where graphs do not work; None where they do."""
    model = config.model
    if device.type == "cpu":
        return "on a CPU"
    if mesh.pp.size > 1:
        return "with a pipeline"
    if mesh.cp.size > 1:
        return "with context parallelism"
    if mesh.shards.size > 1 and shards_weights(config):
        return "with sharded weights"
    if config.peft.scheme is not None:
        return "with adapters"
    if model.recompute_granularity is not None and _draws(config):
        return "with recomputation of dropout"
    if keeps_documents_apart(config):
        return "with documents apart"
    if not config.dataset.pad_to_max_length:
        return "with samples of several lengths"
    if config.mixed_precision.fp16:
        return "with a loss scale that changes"
    # Other losses were not tried in graphs.
    if not config.mixed_precision.bf16 or matmul_mode(device, torch.bfloat16) != "native":
        return "without native BF16 products"
    return _obstacle_of_experts(config, device, mesh) if any(expert_layers(model)) else None


def _obstacle_of_experts(config: ConfigContainer, device: torch.device, mesh: Mesh) -> str | None:
    """Return what of a model with experts waits for the host."""
    model = config.model
    if mesh.ep.size > 1 and model.moe_token_dispatcher_type != "allgather":
        name = model.moe_token_dispatcher_type
        return f"with model.moe_token_dispatcher_type={name}, where the host is told how many tokens travel"
    if evens_by_scaling(model):
        return "with sinkhorn routing, where the host is told when to end"
    if model.moe_router_force_load_balancing:
        return "with model.moe_router_force_load_balancing"
    parts = 1 if mesh.whole_experts else mesh.tp.size
    inner = required(model.moe_ffn_hidden_size) // parts
    expert = Expert(replace(model, moe_ffn_hidden_size=inner), dtype=torch.bfloat16, device=torch.device("meta"))
    tokens = torch.empty(0, required(model.hidden_size), dtype=torch.bfloat16, device=device)
    if not takes_grouped_products(tokens, [expert.linear_fc1, expert.linear_fc2]):
        return "where experts have no grouped products"
    return None


def _draws(config: ConfigContainer) -> bool:
    return max(config.model.hidden_dropout, config.model.attention_dropout) > 0


class Graph(Protocol):
    """What was captured, to be run again on what now lies in the same tensors."""

    def replay(self) -> None:
        """Run it."""

    def reset(self) -> None:
        """Drop what was captured."""


Capture = Callable[[Callable[[], Sequence[torch.Tensor]]], tuple[Graph, Sequence[torch.Tensor]]]
"""Takes a job; returns its graph and the tensors that the job returned, which the graph fills. Nothing has run yet."""


@dataclass(frozen=True)
class _Captured:
    """A graph of one micro-batch, what goes into it and comes out, and the parameters whose gradients it adds."""

    batch: Batch
    graph: Graph
    found: Sequence[torch.Tensor]
    reached: set[torch.Tensor] = field(default_factory=set)

    def run(self, batch: Batch) -> list[torch.Tensor]:
        for each in fields(Batch):
            kept, new = getattr(self.batch, each.name), getattr(batch, each.name)
            if kept is not None:
                kept.copy_(new)
        self.graph.replay()
        return [tensor.clone() for tensor in self.found]


class GraphedPasses:
    """Runs the micro-batches of ``inner`` as graphs, after a first step without.

    A graph has the forward and backward pass of one micro-batch, and the addition of its gradients to those of
    ``weights``, each as soon as it is there: the first micro-batch of a step overwrites them, so it has a graph of its
    own. The kernels are those of the other steps, and the random numbers too.
    """

    def __init__(self, inner: WholePasses, weights: MainWeights, capture: Capture | None = None) -> None:
        self._inner = inner
        self._weights = weights
        weights.gradients.stop_overlap()
        if not _has_dropout(inner.model):
            # Recomputation rewinds what it is given, which no capture allows. The first steps go without it too: what
            # is compiled for them must serve the graphs.
            inner.given = None
        self._capture = capture or CudaCapture(inner.given)
        self._steps = 0
        self._captured: dict[tuple[int, torch.Size, bool], _Captured] = {}
        self.dropout = inner.dropout
        self.routing = inner.routing

    def train(
        self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0
    ) -> torch.Tensor:
        """Run forward and backward passes; see ``Passes``.

        Objective and ``router_weight`` are the same for batches of the same size.
        """
        self._steps += 1
        if self._steps <= _EAGER_STEPS:
            return self._inner.train(batch, micro_batch_size, objective, router_weight)
        self._inner.model.train()
        self._weights.wait()  # Graphs wait for nothing outside of them.
        sums = []
        for number, micro_batch in enumerate(batch.split(micro_batch_size)):
            key = (len(batch), micro_batch.tokens.shape, number == 0)
            if key not in self._captured:
                self._captured[key] = self._captured_pass(micro_batch, objective, router_weight)
            captured = self._captured[key]
            found, *loads = captured.run(micro_batch)
            self._weights.gradients.arrived(captured.reached)
            self.routing.add(loads)
            sums.append(found)
        self.routing.finish()
        return torch.stack(sums)

    def evaluate(self, batch: Batch, micro_batch_size: int) -> torch.Tensor:
        """Run forward passes without dropout; see ``Passes``."""
        return self._inner.evaluate(batch, micro_batch_size)

    def release(self) -> None:
        """Drop all graphs; those that are under way come to their end."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def _captured_pass(self, micro_batch: Batch, objective: Objective, router_weight: float) -> _Captured:
        """Capture the pass of a micro-batch: as the first of a step where no gradient has arrived in this one."""
        held = {each.name: getattr(micro_batch, each.name) for each in fields(Batch)}
        batch = Batch(**{name: value.clone() for name, value in held.items() if value is not None})
        reached: set[torch.Tensor] = set()

        def job() -> Sequence[torch.Tensor]:
            noted = self.routing.apart(router_weight)
            loss_sum, tokens = self._inner.loss(batch, self._inner.given, noted)
            with self._weights.gradients.noting(reached):
                objective(loss_sum, tokens).backward()
            sums = torch.stack([loss_sum.detach(), tokens, *self.routing.means(noted)])
            return [sums, *self.routing.loads(noted)]

        return _Captured(batch, *self._capture(job), reached)


def _has_dropout(model: nn.Module) -> bool:
    return not isinstance(model, GPTModel) or max(model.config.hidden_dropout, model.config.attention_dropout) > 0


class CudaCapture:
    """Captures jobs, which may draw from some random streams, with one pool of memory for all.

    Graphs of one pool overwrite each other's memory, but for the tensors that jobs returned: they run one at a time.
    """

    def __init__(self, streams: DropoutStreams | None) -> None:
        self._streams = streams
        self._pool: Any = None

    def __call__(self, job: Callable[[], Sequence[torch.Tensor]]) -> tuple[Graph, Sequence[torch.Tensor]]:
        """Capture a job."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._streams.generators if self._streams is not None else ():
            graph.register_generator_state(generator)
        # An autograd node that outlives its pass would add gradients up on the stream of that pass. Memory that is kept
        # for passes without graphs is given back on entering.
        gc.collect()
        # The thread that looks after collectives may ask for its events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = job()
        self._pool = graph.pool()
        return graph, result
