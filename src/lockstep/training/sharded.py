"""The optimizer's share of each process: main weights and their state, cut into equal parts.

All weights of a process, laid end to end, are cut into one part for each process that has the same weights. A process
gets the sum of the gradients of its part, updates it, and receives the updated weights of the others.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.models.ops import widened
from lockstep.parallel.mesh import Axis
from lockstep.training.precision import MainWeights


class ShardedMainWeights(MainWeights):
    """Main weights of one part: ``main_params`` are its pieces of parameters, one-dimensional views of one tensor.

    Gradients are handed over before they are added up over ``axis``, in ``reduce_dtype`` where given.
    """

    def __init__(
        self, model: nn.Module, grad_dtype: torch.dtype, axis: Axis, reduce_dtype: torch.dtype | None = None
    ) -> None:
        self._axis = axis
        self._reduce_dtype = reduce_dtype
        super().__init__(model, grad_dtype)

    def _build_main(self) -> None:
        self._sizes = [p.numel() for p in self.model_params]
        self._part = self._laid_out([p.detach() for p in self.model_params])[self._axis.rank].clone()
        first, length = self._axis.rank * len(self._part), len(self._part)
        self.main_names, self.main_shapes, self.main_params = [], [], []
        self.main_spans = []
        self._ranges = []
        start = -first
        for name, param, size in zip(self.names, self.model_params, self._sizes, strict=True):
            begin, end = max(0, start), min(length, start + size)
            if begin < end:
                self.main_spans.append((begin - start, end - start))
                self._ranges.append(slice(begin, end))
                self.main_names.append(name)
                self.main_shapes.append(param.shape)
                self.main_params.append(nn.Parameter(self._part[begin:end]))
            start += size

    def _laid_out(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all elements, at least FP32, as one row for each process, the last filled up with zeros."""
        flat = torch.cat([widened(t).flatten() for t in tensors])
        return nn.functional.pad(flat, (0, -len(flat) % self._axis.size)).view(self._axis.size, -1)

    def hand_over(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give every piece the sum of its gradients over the axis; return the gradients of the pieces."""
        rows = self._laid_out(grads)
        self.part_grad = self._axis.split_sum(rows if self._reduce_dtype is None else rows.to(self._reduce_dtype))
        self.part_grad = widened(self.part_grad)
        for piece, span in zip(self.main_params, self._ranges, strict=True):
            piece.grad = self.part_grad[span]
        return [self.part_grad[span] for span in self._ranges]

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the main weights to the model's dtype, on all processes."""
        for param, values in zip(self.model_params, self.gathered(self._part, self.model_params[0].dtype), strict=True):
            param.copy_(values)

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Set the main weights to the model's, which are equal on all processes."""
        self._part.copy_(self._laid_out([p.detach() for p in self.model_params])[self._axis.rank])

    def gathered(self, part: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return tensors of the shapes of the model's parameters from the parts of all processes, as ``dtype``."""
        flat = self._axis.stacked(part.to(dtype)).flatten()[: sum(self._sizes)]
        return [piece.view_as(p) for piece, p in zip(flat.split(self._sizes), self.model_params, strict=True)]


def build_main_weights(model: nn.Module, config: ConfigContainer, replicas: Axis) -> MainWeights:
    """Return the main weights of a model: this process's part with ``use_distributed_optimizer``, else all.

    ``replicas`` are the processes that have the same weights.
    """
    model_dtype = next(model.parameters()).dtype
    fp32_grads = config.ddp.grad_reduce_in_fp32 is not False
    grad_dtype = torch.float32 if fp32_grads else model_dtype
    if replicas.size > 1 and config.ddp.use_distributed_optimizer:
        return ShardedMainWeights(model, grad_dtype, replicas, None if fp32_grads else model_dtype)
    return MainWeights(model, grad_dtype)
