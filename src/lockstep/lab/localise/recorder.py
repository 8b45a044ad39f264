"""What a run shows of one iteration: hooks on the modules of its model, and an observer of its step.

Nothing is changed in the model: every activation comes from a forward hook, every gradient from a hook of its tensor.
How a tensor of this process lies in the logical one is declared as data, by name, below.

Shape legend: b samples of a micro-batch, q tokens of this process, s tokens of a sample, h hidden, t tokens (b * q).
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.lab.localise.probes import ProbeWriter
from lockstep.lab.localise.stages import CLIPPED, DATA, FORWARD, GRADIENTS, LOSS, OUTPUT, REDUCED, SCHEDULE
from lockstep.models import GPTModel
from lockstep.models.router import Assignment
from lockstep.parallel import Mesh
from lockstep.parallel.context import SequencePart
from lockstep.parallel.fsdp import is_sharded
from lockstep.parallel.gradients import is_tied
from lockstep.parallel.placement import Placement
from lockstep.parallel.plan import has_partial_gradient, is_expert
from lockstep.training.feed import Batch
from lockstep.training.observe import Moment, Observer
from lockstep.training.step import TrainStep

TOKEN_LOSSES = "loss of each token"

_STREAM, _WHOLE, _COLUMNS = "residual stream", "whole", "columns"
"""Split along the sequence under sequence parallelism; whole on tensor-parallel processes; split in dimension 2."""

_LATENT_NORMS = ("*.q_layernorm", "*.kv_layernorm")
_SEEN: tuple[tuple[str, str], ...] = (
    ("embedding", _STREAM),
    ("decoder.layers.*.input_layernorm", _STREAM),
    ("*.linear_qkv", _COLUMNS),
    ("*.linear_q_proj", _COLUMNS),
    ("*.linear_q_up_proj", _COLUMNS),
    ("*.linear_kv_up_proj", _COLUMNS),
    ("*.linear_q_down_proj", _STREAM),
    ("*.linear_kv_down_proj", _STREAM),
    ("*.q_layernorm", _COLUMNS),
    ("*.k_layernorm", _COLUMNS),
    ("*.kv_layernorm", _STREAM),
    ("*.self_attention", _STREAM),
    ("*.pre_mlp_layernorm", _STREAM),
    ("*.mlp.router", _WHOLE),
    ("*.mlp.shared_experts", _STREAM),
    ("decoder.layers.*.mlp", _STREAM),
    ("decoder.final_layernorm", _STREAM),
)

Run = tuple[int, int, int]
"""First element here, first element in the whole, how many."""


class Recorder(Observer):
    """Writes what one step works with; ``micro_batch_size`` samples at a time of the global batch."""

    def __init__(
        self,
        writer: ProbeWriter,
        model: GPTModel,
        step: TrainStep,
        mesh: Mesh,
        placement: Placement,
        iteration: int,
    ) -> None:
        self._writer, self._model, self._step, self._mesh = writer, model, step, mesh
        self._iteration = iteration
        self._placement = placement
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}
        self._losses: list[tuple[Tensor, Tensor, Tensor]] = []
        self.batch: Batch | None = None
        self.micro, self._count = 0, 0

    def __enter__(self) -> "Recorder":
        self._stack = ExitStack()
        latent = self._model.config.multi_latent_attention
        for name, module in self._model.named_modules():
            kind = _kind(name, latent)
            if kind is not None:
                self._hook(module.register_forward_hook(partial(self._forward, name, kind)))
            if _is_layer(name):
                self._hook(module.register_forward_pre_hook(partial(self._context, name)))
        self._hook(self._model.register_forward_hook(self._token_losses, with_kwargs=True))
        if not is_sharded(self._model):
            for name, param in self._model.named_parameters():
                if param.requires_grad:
                    self._hook(param.register_hook(partial(self._parameter_grad, name)))
        optimizer = self._step.optimizer
        self._hook(optimizer.inner.register_step_pre_hook(self._applied))
        before = self._step.observer, optimizer.observer
        self._step.observer = optimizer.observer = self
        self._stack.callback(self._put_back, *before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._write_gradients()
        self._write_losses()

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _put_back(self, of_step: Observer, of_optimizer: Observer) -> None:
        self._step.observer, self._step.optimizer.observer = of_step, of_optimizer

    # The observer's part.

    def begin(self, batch: Batch, micro_batch_size: int, lr: float, weight_decay: float) -> None:
        """Write the batch and the schedule."""
        self.batch, self.micro, self._count = batch, micro_batch_size, len(batch) // micro_batch_size
        self._writer.number(self._iteration, SCHEDULE, "lr", lr)
        self._writer.number(self._iteration, SCHEDULE, "weight decay", weight_decay)
        self._writer.number(self._iteration, SCHEDULE, "loss scale", self._step.optimizer.loss_scale)
        for number, part in enumerate(batch.split(micro_batch_size)):
            for name in ("tokens", "labels", "loss_mask", "position_ids", "document_ids", "rotary_positions"):
                tensor = getattr(part, name)
                if tensor is not None:
                    whole = [(0, 0, tensor.shape[1])]
                    self._write(DATA, name, tensor, number, whole, tensor.shape[1])

    def loss(self, loss_sum: Tensor, tokens: Tensor, value: Tensor) -> None:
        """Note the loss of a micro-batch: numerator, valid tokens, and what is differentiated."""
        self._losses.append((loss_sum.detach(), tokens.detach(), value.detach()))

    @torch.no_grad()
    def gradients(self, moment: Moment, grads: Sequence[Tensor]) -> None:
        """Write the gradients of the main weights."""
        weights = self._step.optimizer.weights
        stage = REDUCED if moment == "reduced" else CLIPPED
        for name, grad, span in zip(weights.main_names, grads, weights.main_spans, strict=True):
            placed = self._placement.placed(name, grad, span)
            for piece in placed.pieces:
                box = placed.view(piece.box.offsets)
                self._tensor(stage, name, box, placed.shape, piece.box.offsets)

    # Hooks.

    def _forward(self, name: str, kind: str, module: nn.Module, _: Any, output: Any) -> None:
        if _in_backward():
            return  # an activation that is recomputed
        number = self._calls[name]
        self._calls[name] += 1
        if isinstance(output, Assignment):
            samples = self.micro
            for what, tensor in (("experts", output.experts), ("weights", output.weights)):
                self._write(FORWARD, f"{name}.{what}", tensor.unflatten(0, (samples, -1)), number, *self._tokens(kind))
            return
        tensor = output[0] if isinstance(output, tuple) else output
        columns = self._mesh.tp if kind == _COLUMNS else None
        self._write(FORWARD, name, tensor, number, *self._tokens(kind), columns=columns)
        if tensor.requires_grad and (name == "embedding" or _is_layer(name)):
            tensor.register_hook(partial(self._activation_grad, name, kind, number))

    def _activation_grad(self, name: str, kind: str, number: int, grad: Tensor) -> None:
        self._write(GRADIENTS, f"{OUTPUT} {name}", grad, number, *self._tokens(kind))

    def _parameter_grad(self, name: str, grad: Tensor) -> None:
        """Add up the gradient of a micro-batch, exactly enough for any dtype."""
        exact = grad.detach().double()
        self._sums[name] = exact if name not in self._sums else self._sums[name] + exact

    def _context(self, name: str, module: nn.Module, arguments: Any) -> None:
        """Write what attention is told of the batch: rotary positions and which keys are hidden."""
        if _in_backward() or len(arguments) < 2:
            return
        context, number = arguments[1], self._calls[name]
        runs, length = self._tokens(_WHOLE)
        for what, tensor in zip(("cosine", "sine"), context.cos_sin or (), strict=False):
            if tensor.dim() == 4:  # of packed samples
                self._write(FORWARD, f"rotary {what}", tensor, number, runs, length)
            elif number == 0:
                for first, there, size in runs:
                    shape, offsets = (length, *tensor.shape[1:]), (there, *(0,) * (tensor.dim() - 1))
                    self._tensor(FORWARD, f"rotary {what}", tensor[first : first + size], shape, offsets)
        hidden = context.mask.hidden
        if context.mask.document_ids is not None:  # of each sample
            self._write(FORWARD, "attention mask", hidden, number, runs, length)
        elif number == 0:
            for first, there, size in runs:
                box, shape = hidden[:, first : first + size], (1, length, hidden.shape[2])
                self._tensor(FORWARD, "attention mask", box, shape, (0, there, 0))

    def _token_losses(self, module: nn.Module, _: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        span = kwargs.get("span")
        if span is None or span.last:
            number = self._calls[TOKEN_LOSSES]
            self._calls[TOKEN_LOSSES] += 1
            self._write(FORWARD, TOKEN_LOSSES, output, number, *self._tokens(_WHOLE))

    def _applied(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Write the learning rate and the weight decay of every parameter."""
        weights = self._step.optimizer.weights
        names = {id(param): name for param, name in zip(weights.main_params, weights.main_names, strict=True)}
        for group in optimizer.param_groups:
            for param in group["params"]:
                for what in ("lr", "weight_decay"):
                    title = f"{what.replace('_', ' ')} of {names[id(param)]}"
                    self._writer.number(self._iteration, SCHEDULE, title, float(group[what]))

    # Placement.

    def _tokens(self, kind: str) -> tuple[list[Run], int]:
        """Return where the tokens of this process stand in a sample, and its length."""
        cp, tp = self._mesh.cp, self._mesh.tp
        assert self.batch is not None, "the step has begun"
        length = self.batch.tokens.shape[1]  # fine-tuning cuts batches to their longest sample
        positions = torch.arange(length)
        if cp.size > 1:
            positions = SequencePart(cp).positions(length, positions.device)
        if kind == _STREAM and self._mesh.sequence_parallel:
            positions = positions.chunk(tp.size)[tp.rank]
        return _runs(positions.tolist()), length

    def _write(
        self, stage: str, name: str, tensor: Tensor, number: int, runs: list[Run], length: int, columns: Any = None
    ) -> None:
        """Write a tensor [b, q, ...] of this process's micro-batch ``number`` as boxes of that of the global batch."""
        dp, micro = self._mesh.dp, number * self._mesh.dp.size + self._mesh.dp.rank
        rest = list(tensor.shape[2:])
        shift = [0] * len(rest)
        if columns is not None and columns.size > 1:
            shift[0], rest[0] = columns.rank * rest[0], columns.size * rest[0]
        shape = (self._count * dp.size * self.micro, length, *rest)
        for first, there, size in runs:
            offsets = (micro * self.micro, there, *shift)
            self._tensor(stage, name, tensor[:, first : first + size], shape, offsets, micro_batch=micro)

    def _tensor(
        self,
        stage: str,
        name: str,
        box: Tensor,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        term: str = "",
        micro_batch: int | None = None,
    ) -> None:
        self._writer.tensor(
            self._iteration, stage, name, box, shape=shape, offsets=offsets, term=term, micro_batch=micro_batch
        )

    # What is known after the step.

    def _write_gradients(self) -> None:
        """Write what this process found for every parameter, as a summand of the whole gradient."""
        mesh, config = self._mesh, self._model.config
        for name, total in self._sums.items():
            replica = mesh.expert_replicas.rank if is_expert(name) else mesh.replicas.rank
            partial_ = mesh.tp.size > 1 and has_partial_gradient(name, config, mesh.sequence_parallel)
            tied = is_tied(name, config, mesh)
            term = f"{replica}.{mesh.tp.rank if partial_ else 0}.{mesh.ends.rank if tied else 0}"
            kept = total if self._model.dtype == torch.float64 else total.float()
            placed = self._placement.placed(name, kept.contiguous())
            for piece in placed.pieces:
                offsets = piece.box.offsets
                self._tensor(GRADIENTS, name, placed.view(offsets), placed.shape, offsets, term=term)

    def _write_losses(self) -> None:
        """Write numerator, valid tokens and divisor of every micro-batch of this process."""
        dp, shape = self._mesh.dp, (self._count * self._mesh.dp.size,)
        for number, (loss_sum, tokens, value) in enumerate(self._losses):
            micro = number * dp.size + dp.rank
            # What is differentiated is zero where no token is valid.
            ratio = (loss_sum.double() / value.double()).nan_to_num(0.0).reshape(1)
            for name, tensor, term in (
                ("loss numerator", loss_sum, str(self._mesh.cp.rank)),
                ("valid tokens", tokens, ""),
                ("divisor", ratio, ""),
            ):
                box = tensor.reshape(1)
                self._tensor(LOSS, name, box, shape, (micro,), term=term, micro_batch=micro)


def _kind(name: str, latent: bool) -> str | None:
    if _is_layer(name):
        return _STREAM
    if latent and any(fnmatchcase(name, pattern) for pattern in _LATENT_NORMS):
        return _STREAM
    return next((kind for pattern, kind in _SEEN if fnmatchcase(name, pattern)), None)


def _is_layer(name: str) -> bool:
    return name.startswith("decoder.layers.") and name.rpartition(".")[2].isdigit() and name.count(".") == 2


def _runs(positions: list[int]) -> list[Run]:
    """Cut positions into runs of neighbours."""
    runs: list[Run] = []
    for here, there in enumerate(positions):
        if runs and there == runs[-1][1] + runs[-1][2]:
            first, start, size = runs[-1]
            runs[-1] = first, start, size + 1
        else:
            runs.append((here, there, 1))
    return runs


def _in_backward() -> bool:
    """Tell whether a backward pass is under way: what runs then is a recomputation."""
    return torch._C._current_graph_task_id() != -1
