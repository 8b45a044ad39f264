"""Passes of a pipeline: PyTorch's schedules over the stages that this process has.

Shapes: m micro-batches, b samples of a micro-batch, s tokens of a sample, h hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.config.stages import num_stages
from lockstep.errors import UserError
from lockstep.models import DropoutStreams, GPTModel
from lockstep.models.decoder import Span
from lockstep.models.layers import required
from lockstep.models.ops import widened
from lockstep.parallel import Mesh
from lockstep.parallel.fsdp import add_up_gradients, release
from lockstep.training.feed import Batch
from lockstep.training.passes import Objective, masked_sum
from lockstep.training.routing import Routing


class PipelinePasses:
    """Passes of a model of which this process has some stages (``spans``): 1F1B, interleaved where it has several.

    Sharded gradients are added up over processes in the last backward pass of each layer only where ``sync_once``.
    ``prepare`` is called before the passes of a batch.
    """

    def __init__(
        self,
        model: GPTModel,
        spans: Sequence[Span],
        mesh: Mesh,
        dropout: DropoutStreams | None = None,
        sync_once: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._sync_once = sync_once
        self._prepare = prepare
        self._mesh = mesh
        self._stages = [_Stage(model, span) for span in spans]
        self.dropout = dropout
        self.routing = Routing(model, mesh.replicas)
        self._schedules: dict[tuple[bool, int, torch.Size], Any] = {}

    def train(self, batch: Batch, micro_batch_size: int, objective: Objective, router_weight: float = 0.0) -> Tensor:
        """Run forward and backward passes; see ``Passes``."""
        self._model.train()
        for stage in self._stages:
            stage.routing, stage.router_weight = self.routing, router_weight
        add_up_gradients(self._model, not self._sync_once)
        if self._sync_once:
            self._expect_backward_passes(len(batch) // micro_batch_size)
        sums = self._run(batch, micro_batch_size, objective, self.dropout)
        for stage in self._stages:
            stage.routing = stage.on_backward = None
        self.routing.finish()
        return sums

    def _expect_backward_passes(self, count: int) -> None:
        """Have gradients added up from where the last of so many backward passes of a stage begins, or of all stages.

        What is not in a layer may belong to several stages.
        """
        left = dict.fromkeys(self._stages, count)

        def begin(stage: _Stage) -> None:
            left[stage] -= 1
            if not left[stage]:
                for number in stage.span.layers:
                    add_up_gradients(self._model.decoder.layers[str(number)], True)
            if not any(left.values()):
                add_up_gradients(self._model, True, recurse=False)

        for stage in self._stages:
            stage.on_backward = partial(begin, stage)

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Run forward passes without dropout; see ``Passes``."""
        self._model.eval()
        return self._run(batch, micro_batch_size, None, None)

    def _run(
        self, batch: Batch, micro_batch_size: int, objective: Objective | None, dropout: DropoutStreams | None
    ) -> Tensor:
        if self._prepare is not None:
            self._prepare()
        count = len(batch) // micro_batch_size
        for stage in self._stages:
            stage.objective, stage.dropout, stage.sums, stage.means = objective, dropout, [], []
        schedule = self._schedule(objective is not None, count, batch.tokens[:micro_batch_size].shape)
        tokens = (batch.tokens,) if self._stages[0].span.first else ()
        run = schedule.step if objective is not None else schedule.eval
        run(*tokens, **batch.aside(), target=batch.labels, return_outputs=False)
        release(self._model)
        return self._mesh.pp.sum_(self._sums(count, objective is not None, batch.tokens.device))

    def _sums(self, count: int, training: bool, device: torch.device) -> Tensor:
        """Return what this process's stages found for each micro-batch; zero where other stages find it."""
        width = 2 + (len(self.routing.names) if training else 0)
        found = widened(torch.zeros(count, width, dtype=self._model.dtype, device=device))
        for stage in self._stages:
            if stage.sums:
                found[:, :2] += torch.stack(stage.sums)
            if stage.means and width > 2:
                found[:, 2:] += torch.stack(stage.means)
        return found

    def _schedule(self, training: bool, count: int, shape: torch.Size) -> Any:
        """Return the schedule of ``count`` micro-batches of tokens of a shape [b, s]; each has buffers of its own."""
        key = (training, count, shape)
        if key not in self._schedules:
            stages = [self._stage(number, training, shape) for number in range(len(self._stages))]
            self._schedules[key] = _build_schedule(stages, count, training)
        return self._schedules[key]

    def _stage(self, number: int, training: bool, shape: torch.Size) -> Any:
        """Wrap a stage, with the shapes of what it receives and sends: PyTorch would run the model to find them."""
        from torch.distributed import pipelining

        stage, mesh, dtype = self._stages[number], self._mesh, self._model.dtype
        meta = partial(torch.empty, device="meta")
        length = shape[1] // (mesh.tp.size if mesh.sequence_parallel else 1)
        hidden = partial(meta, shape[0], length, required(self._model.config.hidden_size), dtype=dtype)
        return pipelining.PipelineStage(
            stage,
            number * mesh.pp.size + mesh.pp.rank,
            num_stages(self._model.config),
            next(self._model.parameters()).device,
            input_args=meta(shape, dtype=torch.int64) if stage.span.first else hidden(requires_grad=training),
            output_args=widened(meta((), dtype=dtype)) if stage.span.last else hidden(requires_grad=training),
            group=mesh.pp.group,
        )


def _build_schedule(stages: list[Any], count: int, training: bool) -> Any:
    """Return 1F1B or its interleaved form; all forward passes first where nothing comes back or all are in flight."""
    from torch.distributed import pipelining

    settings: dict[str, Any] = {"n_microbatches": count, "loss_fn": _given, "scale_grads": False}
    if len(stages) == 1:
        one_by_one = training and count >= stages[0].num_stages
        return (pipelining.Schedule1F1B if one_by_one else pipelining.ScheduleGPipe)(stages[0], **settings)
    try:
        return (pipelining.ScheduleInterleaved1F1B if training else pipelining.ScheduleLoopedBFS)(stages, **settings)
    except ValueError as error:
        raise UserError(f"an interleaved pipeline cannot take {count} micro-batches: {error}") from None


def _given(output: Tensor, _: Tensor) -> Tensor:
    """Return the objective, which the last stage has computed."""
    return output


def _call(job: Callable[[], None], _: Tensor) -> None:
    job()


class _Stage(nn.Module):
    """A run of layers as a module of its own, for the duration of the passes of a batch."""

    def __init__(self, model: GPTModel, span: Span) -> None:
        super().__init__()
        self._model = model
        self.span = span
        self.objective: Objective | None = None
        self.dropout: DropoutStreams | None = None
        self.routing: Routing | None = None
        self.router_weight = 0.0
        self.on_backward: Callable[[], None] | None = None
        self.sums: list[Tensor] = []
        self.means: list[Tensor] = []

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor | None = None,
        rotary_positions: Tensor | None = None,
        valid_tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream [b, s, h] for the next stage, or after the last one the objective (scalar).

        ``on_backward`` is called when the backward pass of what is returned begins.
        """
        result = self._result(x, position_ids, labels, loss_mask, document_ids, rotary_positions, valid_tokens)
        if self.on_backward is not None:
            result.register_hook(partial(_call, self.on_backward))
        return result

    def _result(
        self,
        x: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor | None,
        rotary_positions: Tensor | None,
        valid_tokens: Tensor | None,
    ) -> Tensor:
        noted = None if self.routing is None else self.routing.begin(self.router_weight)
        output = self._model(
            x,
            position_ids,
            labels,
            document_ids=document_ids,
            rotary_positions=rotary_positions,
            dropout=self.dropout,
            router_losses=noted,
            span=self.span,
        )
        if self.routing is not None and noted is not None and self.routing.names:
            self.means.append(torch.stack(self.routing.means(noted)))
        if not self.span.last:
            return output
        loss_sum, tokens = masked_sum(output, loss_mask, valid_tokens)
        self.sums.append(torch.stack([loss_sum.detach(), tokens]))
        return loss_sum if self.objective is None else self.objective(loss_sum, tokens)
