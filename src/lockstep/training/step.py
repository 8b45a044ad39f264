"""One training step: gradients over the micro-batches of a global batch, then one optimizer update.

Shapes: b samples of a micro-batch, s tokens of a sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from lockstep.models import DropoutStreams
from lockstep.parallel import Axis
from lockstep.parallel.kinds import KINDS
from lockstep.training.device import HostCopy
from lockstep.training.feed import Batch, in_global_order
from lockstep.training.observe import Observer
from lockstep.training.optimizer import Optimizer, Update
from lockstep.training.passes import Passes


@dataclass(frozen=True)
class Ledger:
    """What a step's sums are made of: one entry a micro-batch, in the order of the global batch.

    Attributes:
        ranks: data-parallel processes; micro-batch i is of rank i modulo ``ranks``.
        loss_sums: sum over valid tokens of the loss.
        tokens: tokens that count in the loss.
        divisors: what the loss sum was divided by before the gradients were added up.
        router_weight: factor on the losses that routers add; None without any.
        grad_norms: L2 norm before clipping of each kind of parameters that has one; empty for a skipped step.
    """

    ranks: int
    loss_sums: list[float]
    tokens: list[int]
    divisors: list[float]
    router_weight: float | None
    grad_norms: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """What one step computed and did.

    Attributes:
        loss_sum: sum over valid tokens of the loss in nats.
        valid_tokens: tokens that count in the loss.
        grad_norm: global L2 norm before clipping; None when the step was skipped.
        num_zeros: gradient elements that are zero, where asked for.
        skipped: the gradients overflowed and nothing was updated.
        loss_scale: the scale after the step, which the next one uses.
        router_losses: mean over micro-batches and layers of each loss that routers add, by its name.
    """

    loss_sum: float
    valid_tokens: int
    grad_norm: float | None
    num_zeros: int | None
    skipped: bool
    loss_scale: float
    router_losses: dict[str, float] = field(default_factory=dict)
    ledger: Ledger | None = None

    @property
    def lm_loss(self) -> float:
        """Mean loss per valid token of the global batch; NaN without any."""
        return self.loss_sum / self.valid_tokens if self.valid_tokens else math.nan


@dataclass(frozen=True)
class Launched:
    """A step whose work the device has been given, and what is known of it by then; see ``StepResult``.

    ``found`` are the sums of each of ``micro_batches`` and then what the optimizer measured, in FP64, on their way to
    the host; ``divisors`` turns the valid tokens of micro-batches into what their losses were divided by.
    """

    skipped: bool
    loss_scale: float
    found: HostCopy
    micro_batches: int
    router_names: tuple[str, ...]
    router_weight: float
    divisors: Callable[[torch.Tensor], list[float]]
    ranks: int

    def result(self) -> StepResult:
        """Wait for what the step found and return it."""
        values = self.found.read()
        sums, measured = values.tensor_split([self.micro_batches * (2 + len(self.router_names))])
        losses, tokens, *added = sums.view(self.micro_batches, -1).T.tolist()
        norm, norms, zeros = _measured(measured.tolist())
        return StepResult(
            loss_sum=math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses),
            valid_tokens=int(sum(tokens)),
            grad_norm=norm,
            num_zeros=zeros,
            skipped=self.skipped,
            loss_scale=self.loss_scale,
            router_losses={
                name: math.fsum(values) / len(values) for name, values in zip(self.router_names, added, strict=True)
            },
            ledger=Ledger(
                ranks=self.ranks,
                loss_sums=losses,
                tokens=[int(n) for n in tokens],
                divisors=self.divisors(torch.tensor(tokens)),
                router_weight=self.router_weight if added else None,
                grad_norms=norms,
            ),
        )


class TrainStep:
    """Runs steps of one model, through ``passes``, with one optimizer.

    By default the gradient is that of the mean over micro-batches of their mean loss per token; with ``per_token`` it
    is that of the mean over all tokens of the global batch. They differ where micro-batches have unequal numbers of
    valid tokens. What routers add is the mean over micro-batches either way: they count all tokens, valid or not. Each
    process of the data-parallel axis ``dp`` has its own micro-batches of the global batch.
    """

    def __init__(self, passes: Passes, optimizer: Optimizer, per_token: bool = False, dp: Axis | None = None) -> None:
        self._passes = passes
        self.optimizer = optimizer
        self._per_token = per_token
        self._dp = dp or Axis()
        self.observer = Observer()

    @property
    def dropout(self) -> DropoutStreams | None:
        """The streams that dropout masks are drawn from."""
        return self._passes.dropout

    @property
    def observed(self) -> bool:
        """Whether anyone looks on."""
        return type(self.observer) is not Observer or type(self.optimizer.observer) is not Observer

    def __call__(self, batch: Batch, micro_batch_size: int, lr: float, weight_decay: float) -> StepResult:
        """Take one step on this process's part of a global batch with a learning rate and weight decay."""
        return self.launch(batch, micro_batch_size, lr, weight_decay).result()

    def launch(self, batch: Batch, micro_batch_size: int, lr: float, weight_decay: float) -> Launched:
        """Give the device the work of one step.

        Nothing is read back, but for whether gradients overflowed where there is a loss scale.
        """
        self.observer.begin(batch, micro_batch_size, lr, weight_decay)
        micro_batches = len(batch) // micro_batch_size
        self.optimizer.start_step(micro_batches)
        count = micro_batches * self._dp.size
        scale = self.optimizer.loss_scale

        def objective(loss_sum: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            value = loss_sum
            for divisor in () if self._per_token else _divisors(tokens, count):
                value = value / divisor
            value = value * scale if scale != 1.0 else value
            self.observer.loss(loss_sum, tokens, value)
            return value

        router_weight = scale * (micro_batch_size * batch.tokens.shape[1] if self._per_token else 1.0 / count)
        found = self._passes.train(batch, micro_batch_size, objective, router_weight)
        sums = in_global_order(found, self._dp)  # [micro-batches, 2 or more]
        factor = 1.0 / sums[:, 1].sum().clamp(min=1) if self._per_token else None
        update = self.optimizer.step(lr, weight_decay, factor)
        return Launched(
            skipped=update.skipped,
            loss_scale=self.optimizer.loss_scale,
            found=HostCopy(torch.cat([sums.double().flatten(), *_measurements(update)])),
            micro_batches=len(sums),
            router_names=self._passes.routing.names,
            router_weight=router_weight,
            divisors=partial(self._divisors_of, count=count),
            ranks=self._dp.size,
        )

    def _divisors_of(self, tokens: torch.Tensor, count: int) -> list[float]:
        if self._per_token:
            return [float(tokens.sum().clamp(min=1))] * len(tokens)
        return [float(valid) * float(batches) for valid, batches in (_divisors(n, count) for n in tokens)]


def _divisors(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
    """Return what a micro-batch's loss sum is divided by: its valid tokens, and the number of micro-batches."""
    return tokens.clamp(min=1), count


def _measurements(update: Update) -> list[torch.Tensor]:
    """Return what an update measured as FP64 vectors; ``_measured`` reads them."""
    if update.grad_norm is None or update.grad_norms is None:
        return []
    zeros = [] if update.num_zeros is None else [update.num_zeros.double().reshape(1)]
    return [update.grad_norm.double().reshape(1), update.grad_norms, *zeros]


def _measured(values: list[float]) -> tuple[float | None, dict[str, float], int | None]:
    """Return the norm, that of each kind that has gradients, and the number of zeros where they were counted."""
    if not values:
        return None, {}, None
    norm, norms, zeros = values[0], values[1 : 1 + len(KINDS)], values[1 + len(KINDS) :]
    found = {kind: value for kind, value in zip(KINDS, norms, strict=True) if value != 0}
    return norm, found, int(zeros[0]) if zeros else None
