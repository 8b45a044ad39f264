"""The optimizer: weight-decay groups, gradient norm, clipping, and one update of the main weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.config.training import OptimizerConfig
from lockstep.models.ops import widened
from lockstep.parallel import Mesh
from lockstep.parallel.gradients import Gradients
from lockstep.training.observe import Observer
from lockstep.training.precision import LossScaler, MainWeights, build_loss_scaler
from lockstep.training.sharded import build_main_weights
from lockstep.training.update import SGD, AdamW

_WIDE_ELEMENTS = 1 << 28  # 1 GiB of FP32 gradients
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    ``grad_norm`` is the global L2 norm before clipping; ``grad_norms`` are those of each of ``KINDS``; ``num_zeros``
    counts zero gradient elements where asked for. They are tensors, so that a GPU need not be waited for. A step that
    was skipped because gradients overflowed has none of them.
    """

    skipped: bool
    grad_norm: torch.Tensor | None
    num_zeros: torch.Tensor | None
    grad_norms: torch.Tensor | None = None


def is_decayed(name: str, shape: torch.Size, apply_wd_to_qk_layernorm: bool) -> bool:
    """Tell whether weight decay applies: not to biases and vectors, unless of query and key norms when asked for."""
    if apply_wd_to_qk_layernorm and ("q_layernorm." in name or "k_layernorm." in name):
        return True
    return not name.endswith(".bias") and len(shape) != 1


class WideGradients(Sequence[torch.Tensor]):
    """Gradients as at least FP32 tensors, times what they have been multiplied by.

    Those ``given`` in FP32 are multiplied in place. Lower ones are widened and multiplied anew whenever they are asked
    for, so that not all wide ones are held at once.
    """

    def __init__(self, given: list[torch.Tensor]) -> None:
        self.given = given
        self.low = bool(given) and widened(given[0][:0]).dtype != given[0].dtype
        self._factors: list[torch.Tensor | float] = []

    def multiply(self, factor: torch.Tensor | float) -> None:
        """Multiply all gradients by a number or scalar tensor."""
        if self.low:
            self._factors.append(factor)
        elif self.given:
            torch._foreach_mul_(self.given, factor)

    def parts(self) -> Iterator[range]:
        """Yield which gradients to take at a time: all, or some whose wide copies take little memory."""
        first, elements = 0, 0
        for number, grad in enumerate(self.given):
            if self.low and number > first and elements + grad.numel() > _WIDE_ELEMENTS:
                yield range(first, number)
                first, elements = number, 0
            elements += grad.numel()
        yield range(first, len(self.given))

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Any:
        if not self.low:
            return self.given[index]
        wide = widened(self.given[index])
        for factor in self._factors:
            wide.mul_(factor)
        return wide


class Optimizer:
    """Updates a model's weights through FP32 main weights; ``mesh`` is the layout of the model.

    ``step`` unscales, clips and applies the gradients that backward passes have left since ``start_step``.
    """

    def __init__(self, model: nn.Module, config: ConfigContainer, mesh: Mesh | None = None) -> None:
        mesh = mesh or Mesh()
        self.weights = build_main_weights(model, config, mesh)
        pieces = self.weights.main_names if self.weights.sharded else None
        self._gradients = Gradients(self.weights.names, config.model, mesh, pieces)
        self.scaler: LossScaler | None = build_loss_scaler(config.mixed_precision)
        self.grads: WideGradients | None = None  # what the last step applied, until the next one begins
        self._settings = config.optimizer
        self._count_zeros = config.logger.log_num_zeros_in_grad
        self.groups = _groups(self.weights, config.optimizer.apply_wd_to_qk_layernorm)
        self.inner = _build(self.groups, config.optimizer)
        self.observer = Observer()

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 without a scaler."""
        return self.scaler.scale if self.scaler is not None else 1.0

    def start_step(self, micro_batches: int | None = None) -> None:
        """Forget the gradients of the step before; ``micro_batches`` are the backward passes to come, where known."""
        self.grads = None
        self.weights.start_step(micro_batches)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, grad_factor: torch.Tensor | None = None) -> Update:
        """Apply the gradients with a learning rate and weight decay.

        ``grad_factor`` (scalar tensor) multiplies the gradients first. Gradients that overflowed leave the weights as
        they were and lower the loss scale.
        """
        self._gradients.add_shared(self.weights.collect_grads())
        grads = self.grads = WideGradients(self.weights.hand_over())
        if grad_factor is not None:
            grads.multiply(grad_factor)
        if self.scaler is not None and self._unscale(grads, self.scaler):
            return Update(skipped=True, grad_norm=None, num_zeros=None)
        self.observer.gradients("reduced", grads)
        norm, norms = self._gradients.norms(grads)
        if self._settings.clip_grad > 0:
            grads.multiply((self._settings.clip_grad / (norm + _CLIP_EPSILON)).clamp(max=1.0))
        self.observer.gradients("clipped", grads)
        zeros = self._zeros(grads) if self._count_zeros else None
        for group in self.inner.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self._apply(grads)
        self.weights.copy_to_model()
        return Update(skipped=False, grad_norm=norm, num_zeros=zeros, grad_norms=norms)

    def _apply(self, grads: WideGradients) -> None:
        """Update the main weights, some after the others where their gradients must be widened."""
        for part in grads.parts():
            for i in part:
                self.weights.main_params[i].grad = grads[i]
            self.inner.step()
            if grads.low:
                for i in part:
                    self.weights.main_params[i].grad = None

    def _unscale(self, grads: WideGradients, scaler: LossScaler) -> bool:
        """Divide the gradients by the loss scale, update the scale, and tell whether any gradient overflowed.

        Only here a step waits for the device: the next scale, and whether weights move at all, depend on the answer.
        """
        grads.multiply(1.0 / scaler.scale)
        highest = torch.stack([torch.linalg.vector_norm(grad, float("inf")) for grad in grads])
        overflow = self._gradients.anywhere(~torch.isfinite(torch.linalg.vector_norm(highest, float("inf"))))
        scaler.update(overflow)
        return overflow

    def _zeros(self, grads: WideGradients) -> torch.Tensor:
        return self._gradients.count([g.numel() - g.count_nonzero() for g in grads.given])

    @torch.no_grad()
    def params_norm(self) -> torch.Tensor:
        """Return the L2 norm of the main weights, a scalar."""
        return self._gradients.norm([p.detach() for p in self.weights.main_params])


def _groups(weights: MainWeights, apply_wd_to_qk_layernorm: bool) -> list[dict[str, object]]:
    """Return the parameter groups, decayed weights first; an empty group is left out."""
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, shape, param in zip(weights.main_names, weights.main_shapes, weights.main_params, strict=True):
        split[is_decayed(name, shape, apply_wd_to_qk_layernorm)].append(param)
    return [{"params": params, "decayed": decayed} for decayed, params in split.items() if params]


def _build(groups: list[dict[str, object]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    # The learning rate and weight decay given here are placeholders: every step sets both.
    if settings.optimizer == "sgd":
        return SGD(groups, lr=0.0, momentum=settings.sgd_momentum, fused=True)
    betas = (settings.adam_beta1, settings.adam_beta2)
    return AdamW(groups, lr=0.0, betas=betas, eps=settings.adam_eps, fused=True)
