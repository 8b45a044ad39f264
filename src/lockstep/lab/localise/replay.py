"""One step by the book, with another decoder: same tokens, weights and optimizer state as a run, own arithmetic.

What a decoder is given comes from the probes of the run; everything after its logits is written here: cross entropy,
divisors, sums of gradients, norm, clipping, AdamW and SGD. It shares no code with the trainer.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.errors import UserError
from lockstep.lab.localise import stages
from lockstep.lab.localise.probes import Probes, ProbeWriter
from lockstep.lab.localise.recorder import TOKEN_LOSSES
from lockstep.lab.localise.reference import Note
from lockstep.lab.localise.worker import RUN, TWIN


class Decoder(Protocol):
    """A decoder that is not Lockstep's, with weights under the names of Lockstep's parameters.

    ``inner`` is the dtype of what it computes with the fewest digits when its weights are float64.
    """

    title: str
    inner: str

    def load(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take weights, float64, in another dtype."""

    def weights(self) -> dict[str, Tensor]:
        """Return them."""

    def gradients(self) -> dict[str, Tensor]:
        """Return what backward passes have left, and forget it."""

    def logits(self, tokens: Tensor, positions: Tensor, documents: Tensor | None, note: Note) -> Tensor:
        """Return logits [b, s, v]."""


def replay(decoder: Decoder, run: Probes, iterations: list[int], folder: Path) -> None:
    """Take the steps of a run with another decoder and write their probes, in the dtype of the run and in float64.

    Raises:
        UserError: the run does what no book has, such as dropout.
    """
    config = run.facts["config"]
    if max(config["model"]["hidden_dropout"], config["model"]["attention_dropout"]) > 0:
        raise UserError(f"{decoder.title} draws no dropout masks; compare a run with dropout 0")
    if config.get("peft", {}).get("scheme") is not None:
        raise UserError(f"{decoder.title} has no adapters; compare a run that trains all weights")
    if any(run.logical(iteration, stages.DATA, "rotary_positions") is not None for iteration in iterations):
        raise UserError(f"{decoder.title} has one sample in each row; compare a run without packing")
    for kind, dtype in ((RUN, getattr(torch, run.facts["dtype"])), (TWIN, torch.float64)):
        writer = ProbeWriter()
        writer.facts = {**run.facts, "active": {}, "dtype": str(dtype).removeprefix("torch."), "inner": decoder.inner}
        for iteration in iterations:
            _Step(decoder, run, writer, iteration, dtype).take()
        writer.write(folder, kind)


class _Step:
    """One step of one pass."""

    def __init__(self, decoder: Decoder, run: Probes, writer: ProbeWriter, iteration: int, dtype: torch.dtype) -> None:
        self._decoder, self._run, self._writer = decoder, run, writer
        self._iteration, self._dtype = iteration, dtype
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._config: dict[str, dict[str, Any]] = run.facts["config"]
        self._scale = self._number(stages.SCHEDULE, "loss scale") or 1.0

    def take(self) -> None:
        """Take it."""
        start = {name: self._whole(stages.WEIGHTS, name) for name in self._run.names(self._iteration, stages.WEIGHTS)}
        self._decoder.load(start, self._dtype)
        self._tensors(stages.WEIGHTS, self._decoder.weights())
        batch = {name: self._whole(stages.DATA, name) for name in self._run.names(self._iteration, stages.DATA)}
        self._tensors(stages.DATA, batch)
        grads, valid = self._passes(batch)
        self._tensors(stages.GRADIENTS, grads)
        factor = 1.0 / max(valid, 1.0) if self._config["model"]["calculate_per_token_loss"] else 1.0
        grads = {name: grad.to(self._wide) * factor / self._scale for name, grad in grads.items()}
        self._tensors(stages.REDUCED, grads)
        norm = math.sqrt(math.fsum(float(grad.double().square().sum()) for grad in grads.values()))
        self._writer.number(self._iteration, stages.NORM, "gradient norm", norm)
        limit = self._config["optimizer"]["clip_grad"]
        if 0 < limit < norm + 1e-6:
            grads = {name: grad * (limit / (norm + 1e-6)) for name, grad in grads.items()}
        self._tensors(stages.CLIPPED, grads)
        self._update(grads)

    def _passes(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Run all micro-batches; return the sums of their gradients and the number of valid tokens."""
        size = self._config["train"]["micro_batch_size"]
        count = len(batch["tokens"]) // size
        total: dict[str, Tensor] = {}
        found = []
        for number in range(count):
            part = {name: tensor[number * size : (number + 1) * size] for name, tensor in batch.items()}
            note = _Notes(self._writer, self._iteration, len(batch["tokens"]), number * size, number)
            loss_sum, tokens = self._loss(part, note)
            divisor = 1.0 if self._config["model"]["calculate_per_token_loss"] else max(tokens, 1.0) * count
            (loss_sum / divisor * self._scale).backward()
            for name, grad in self._decoder.gradients().items():
                total[name] = total[name] + grad.double() if name in total else grad.double()
            found.append((float(loss_sum.detach()), tokens, divisor / self._scale))
        for name, values in zip(("loss numerator", "valid tokens", "divisor"), zip(*found, strict=True), strict=True):
            self._tensors(stages.LOSS, {name: torch.tensor(values, dtype=self._wide)})
        return total, sum(tokens for _, tokens, _ in found)

    def _loss(self, part: Mapping[str, Tensor], note: "_Notes") -> tuple[Tensor, float]:
        logits = self._decoder.logits(part["tokens"], part["position_ids"], part.get("document_ids"), note)
        losses = F.cross_entropy(logits.to(self._wide).flatten(0, 1), part["labels"].flatten(), reduction="none")
        losses = losses.view(part["labels"].shape)
        note(TOKEN_LOSSES, losses)
        mask = part["loss_mask"].to(self._wide)
        return (losses * mask).sum(), float(mask.sum())

    def _update(self, grads: Mapping[str, Tensor]) -> None:
        settings = self._config["optimizer"]
        lr, decay = self._number(stages.SCHEDULE, "lr"), self._number(stages.SCHEDULE, "weight decay")
        assert lr is not None, "a run has a learning rate"
        assert decay is not None, "a run has a weight decay"
        for name, value in (("lr", lr), ("weight decay", decay), ("loss scale", self._scale)):
            self._writer.number(self._iteration, stages.SCHEDULE, name, value)
        after, own_weights = {}, self._decoder.weights()
        for name, grad in grads.items():
            vector = grad.dim() < 2 or name.endswith(".bias")
            of_heads = settings["apply_wd_to_qk_layernorm"] and ("q_layernorm." in name or "k_layernorm." in name)
            own = 0.0 if vector and not of_heads else decay
            self._writer.number(self._iteration, stages.SCHEDULE, f"lr of {name}", lr)
            self._writer.number(self._iteration, stages.SCHEDULE, f"weight decay of {name}", own)
            main = self._state("main", name) if self._dtype != torch.float64 else None
            weight = (own_weights[name] if main is None else main).to(self._wide)
            rule = self._sgd if settings["optimizer"] == "sgd" else self._adam
            after[name] = rule(name, weight, grad, lr, own)
        self._tensors(stages.MAIN, after)

    def _adam(self, name: str, weight: Tensor, grad: Tensor, lr: float, decay: float) -> Tensor:
        """Adam with decoupled weight decay (Loshchilov and Hutter, algorithm 2)."""
        settings = self._config["optimizer"]
        beta1, beta2 = settings["adam_beta1"], settings["adam_beta2"]
        step = int(self._number(stages.STATE, "updates") or 0) + 1
        first, second = (self._state(kind, name) for kind in ("exp_avg", "exp_avg_sq"))
        mean = (0.0 if first is None else beta1 * first.to(self._wide)) + (1 - beta1) * grad
        square = (0.0 if second is None else beta2 * second.to(self._wide)) + (1 - beta2) * grad.square()
        mean, square = mean / (1 - beta1**step), square / (1 - beta2**step)
        return weight - lr * decay * weight - lr * mean / (square.sqrt() + settings["adam_eps"])

    def _sgd(self, name: str, weight: Tensor, grad: Tensor, lr: float, decay: float) -> Tensor:
        """Gradient descent with momentum, weight decay as a part of the gradient."""
        grad, momentum = grad + decay * weight, self._state("momentum_buffer", name)
        if momentum is not None:
            grad = self._config["optimizer"]["sgd_momentum"] * momentum.to(self._wide) + grad
        return weight - lr * grad

    def _state(self, kind: str, name: str) -> Tensor | None:
        found = self._run.logical(self._iteration, stages.STATE, f"{kind}.{name}")
        return None if found is None else found.whole

    def _whole(self, stage: str, name: str) -> Tensor:
        found = self._run.logical(self._iteration, stage, name)
        assert found is not None, "the run tells it"
        return found.whole

    def _number(self, stage: str, name: str) -> float | None:
        return self._run.number(self._iteration, stage, name)

    def _tensors(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._writer.tensor(self._iteration, stage, name, tensor)


class _Notes:
    """Writes activations of a micro-batch, and gradients of those that a run shows the gradients of."""

    def __init__(self, writer: ProbeWriter, iteration: int, samples: int, first: int, micro_batch: int) -> None:
        self._writer, self._iteration, self._samples = writer, iteration, samples
        self._first, self._micro_batch = first, micro_batch
        self._told: set[str] = set()

    def __call__(self, name: str, tensor: Tensor) -> None:
        """Write an activation [b, s, ...]."""
        if name.startswith("rotary"):
            if self._first == 0 and name not in self._told:
                self._writer.tensor(self._iteration, stages.FORWARD, name, tensor)
            self._told.add(name)
            return
        self._box(stages.FORWARD, name, tensor)
        layer = name.startswith("decoder.layers.") and name.count(".") == 2
        if tensor.requires_grad and (name == "embedding" or layer):
            tensor.register_hook(lambda grad: self._box(stages.GRADIENTS, f"{stages.OUTPUT} {name}", grad))

    def _box(self, stage: str, name: str, tensor: Tensor) -> None:
        shape, offsets = (self._samples, *tensor.shape[1:]), (self._first, *(0,) * (tensor.dim() - 1))
        self._writer.tensor(
            self._iteration, stage, name, tensor, shape=shape, offsets=offsets, micro_batch=self._micro_batch
        )
