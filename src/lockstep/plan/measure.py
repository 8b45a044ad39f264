"""The memory of a training run on one of its GPUs, found by running its own code on the meta device."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lockstep.config import ConfigContainer
from lockstep.config.stages import stage_layers
from lockstep.models import GPTModel
from lockstep.models.decoder import Head
from lockstep.models.init import fill
from lockstep.parallel import Mesh, parallelize
from lockstep.parallel.mesh import build_mesh
from lockstep.peft.apply import add_adapters
from lockstep.plan.gpus import Gpu
from lockstep.plan.standins import like_gpu
from lockstep.plan.tracker import PARTS, MemoryTracker, Part
from lockstep.training.attention import choose_attention, use_attention
from lockstep.training.batches import build_batch_schedule, eval_batch_size
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer, Update
from lockstep.training.precision import params_dtype
from lockstep.training.setup import build_passes
from lockstep.training.step import TrainStep

_META = torch.device("meta")
# Threads that multiply matrices, each with a workspace: that of the forward pass and that of the backward pass.
_MULTIPLYING_THREADS = 2


@dataclass(frozen=True)
class Memory:
    """What one process holds at its peak.

    Attributes:
        rank: of the process.
        parts: bytes by part; they add up to the peak.
        highest: the most that each part has at any time; another part may have its most at another time.
        moment: what the process is doing at the peak.
        parameters: of the model, on this process.
        resident_bytes: what it holds between two iterations.
    """

    rank: int
    parts: dict[Part, int]
    highest: dict[Part, int]
    moment: str
    parameters: int
    resident_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The sum of all parts: what ``torch.cuda.max_memory_allocated`` counts."""
        return sum(self.parts.values())


def measure(config: ConfigContainer, world_size: int, gpu: Gpu, limit: int | None = None) -> Memory:
    """Return the memory of the process that needs most, for a resolved configuration with its vocabulary.

    Raises:
        OverLimit: a process needs more than ``limit`` bytes, which spares measuring how much more.
    """
    ranks = _unlike_ranks(config, world_size)
    return max((_measure_rank(config, world_size, rank, gpu, limit) for rank in ranks), key=lambda m: m.peak_bytes)


def _unlike_ranks(config: ConfigContainer, world_size: int) -> list[int]:
    """Return the ranks of which one needs most: along all axes but that of the pipeline the first always does.

    Earlier stages have more micro-batches in flight, and the first has the embedding: a later one counts where it has
    more layers than all before it, and the last, which has the logits.
    """
    layers, stages = stage_layers(config.model), config.model.pipeline_model_parallel_size
    held = [sum(map(len, layers[stage::stages])) for stage in range(stages)]
    unlike = [stage for stage in range(stages) if stage in (0, stages - 1) or held[stage] > max(held[:stage])]
    return [stage * world_size // stages for stage in unlike]


def _measure_rank(config: ConfigContainer, world_size: int, rank: int, gpu: Gpu, limit: int | None) -> Memory:
    gc.collect()  # what earlier measurements left in cycles must not be freed in the middle of this one
    with _processes(config, world_size, rank) as mesh, MemoryTracker(limit) as tracker, like_gpu():
        tracker.reserve("workspace", _MULTIPLYING_THREADS * gpu.workspace_bytes)
        run = _Run(config, mesh, tracker)
        run.set_up_state()
        tracker.reset_peak()
        resident = sum(tracker.present.values())
        run.iterate()
        run.evaluate()
        highest = {part: tracker.highest[part] for part in PARTS}
        return Memory(rank, tracker.peak_parts, highest, tracker.peak_moment, run.parameters, resident)


@contextmanager
def _processes(config: ConfigContainer, world_size: int, rank: int) -> Iterator[Mesh]:
    """Pretend to be one of several processes, whose exchanges do nothing."""
    if world_size == 1:
        yield Mesh()
        return
    hook = sys.excepthook  # which PyTorch replaces by one that names the rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_mesh(config.model, "cpu")
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


class _Run:
    """The model, optimizer and step of one process, with the part of every tensor told to the tracker."""

    def __init__(self, config: ConfigContainer, mesh: Mesh, tracker: MemoryTracker) -> None:
        self._config, self._tracker, self._mesh = config, tracker, mesh
        self._batches = build_batch_schedule(config, mesh.dp.size)
        with tracker.during("weights", "building the model"):
            self._model = GPTModel(config.model, dtype=params_dtype(config), device=_META)
            add_adapters(self._model, config.peft)
            spans = parallelize(self._model, mesh)
            fill(self._model, _own_values(self._model))
        use_attention(self._model, choose_attention(config, _META))
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._label_weights()
        self._model.head = _Head(self._model.head, tracker)
        with tracker.during("gradients", "building the optimizer"):  # its buffers: main weights are told apart
            self._optimizer = _TrackedOptimizer(self._model, config, mesh, tracker)
        self._passes = build_passes(config, self._model, spans, mesh, torch.device("cpu"))
        assert self._passes.dropout is not None, "a run has random streams"
        self._passes.dropout.device = _META  # the generators stay on the CPU: there are none for the meta device
        per_token = config.model.calculate_per_token_loss
        self._step = TrainStep(self._passes, self._optimizer, per_token=per_token, dp=mesh.dp)

    def set_up_state(self) -> None:
        """Take a step without gradients, which leaves the optimizer with its state."""
        self._optimizer.start_step()
        self._optimizer.step(1.0, 0.0)

    def iterate(self) -> None:
        """Take one step, on no more than the micro-batches that are unlike of those that the device holds."""
        micro, size = self._batches.micro_batch_size, self._batches.stages[-1][1] // self._mesh.dp.size
        with self._tracker.during("activations", "forward and backward pass"):
            whole = self._batch(size)
            self._step(_first(whole, self._unlike(size // micro) * micro), micro, lr=1.0, weight_decay=0.0)

    def evaluate(self) -> None:
        """Run one forward pass of an evaluation, or as many as fill a pipeline."""
        if self._config.validation.eval_iters == 0:
            return
        size, micro = eval_batch_size(self._config)
        size //= self._mesh.dp.size
        with self._tracker.during("activations", "evaluation"):
            whole = self._batch(size)
            self._passes.evaluate(_first(whole, self._unlike(size // micro) * micro), micro)

    def _unlike(self, micro_batches: int) -> int:
        """Return after how many micro-batches all others are like those before them.

        The first fills the buffers of gradients, the second adds to them; a pipeline fills, and empties.
        """
        return min(micro_batches, 2 * self._mesh.pp.size)

    def _label_weights(self) -> None:
        for name, param in self._model.named_parameters():
            self._tracker.assign(param, part_of(name, "weights"))
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(partial(self._label_grad, part_of(name, "gradients")))

    def _label_grad(self, part: Part, param: Tensor) -> None:
        if param.grad is not None:
            self._tracker.assign(param.grad, part)

    def _batch(self, samples: int) -> Batch:
        assert self._config.model.seq_length is not None, "a resolved tree has a sample length"
        ids, mask = (
            torch.empty(samples, self._config.model.seq_length, dtype=dtype, device=_META)
            for dtype in (torch.int64, torch.float32)
        )
        dataset = self._config.dataset
        documents = torch.empty_like(ids) if dataset.reset_attention_mask or dataset.enable_offline_packing else None
        rotary = torch.empty_like(ids) if dataset.enable_offline_packing else None
        return Batch(ids, torch.empty_like(ids), mask, torch.empty_like(ids), documents, rotary)


def _own_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what the parameters are, so that filling the model with it changes the layout of its memory alone."""
    for name in [name for name, _ in model.named_parameters()]:
        yield name, model.get_parameter(name).detach()


def part_of(name: str, part: Part) -> Part:
    """Return the part that memory of a parameter counts to: ``part``, but for experts, which have one of their own."""
    return "experts" if ".experts." in name else part


def _first(batch: Batch, samples: int) -> Batch:
    return next(batch.split(samples))


class _Head:
    """Calls the model's head; what it allocates, forward and backward, are logits."""

    def __init__(self, inner: Head, tracker: MemoryTracker) -> None:
        self._inner, self._tracker = inner, tracker

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        with self._tracker.during("logits"):
            losses = self._inner(hidden, weight, labels)
        if losses.requires_grad:
            losses.register_hook(lambda _: self._go_on_with("logits"))
            hidden.register_hook(lambda _: self._go_on_with("activations"))
        return losses

    def _go_on_with(self, part: Part) -> None:
        self._tracker.part = part


class _TrackedOptimizer(Optimizer):
    """The optimizer; what a step allocates is workspace unless it stays as a gradient or as state."""

    def __init__(self, model: nn.Module, config: ConfigContainer, mesh: Mesh, tracker: MemoryTracker) -> None:
        super().__init__(model, config, mesh)
        self._tracker = tracker
        self._label()

    def step(self, lr: float, weight_decay: float, grad_factor: Tensor | None = None) -> Update:
        """Take a step as the optimizer does."""
        with self._tracker.during("workspace", "optimizer step"):
            update = super().step(lr, weight_decay, grad_factor)
            self._label()
        return update

    def _label(self) -> None:
        # A sharded optimizer lays the model's weights out anew.
        for name, param in zip(self.weights.names, self.weights.model_params, strict=True):
            self._tracker.assign(param, part_of(name, "weights"))
        models = set(self.weights.model_params)
        for name, main in zip(self.weights.main_names, self.weights.main_params, strict=True):
            if main not in models:
                self._tracker.assign(main, part_of(name, "optimizer"))
            if main.grad is not None:
                self._tracker.assign(main.grad, part_of(name, "gradients"))
            for value in self.inner.state[main].values() if main in self.inner.state else ():
                if isinstance(value, Tensor):
                    self._tracker.assign(value, part_of(name, "optimizer"))
