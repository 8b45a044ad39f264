"""What is planted: functions that stand in for one of the product's, which they get as their first argument."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from lockstep.lab.localise import worker
from lockstep.models import ops
from lockstep.parallel import dropout
from lockstep.parallel.mesh import Axis
from lockstep.training import optimizer

Plant = Callable[[], AbstractContextManager[Any]]


def changed(owner: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Replace a function by ``change(original, *arguments)``."""

    def plant() -> AbstractContextManager[Any]:
        original = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


# Data.


def labels_shifted(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    return batch | {"labels": batch["labels"].roll(-1, dims=1)}


def first_token_masked(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    mask = batch["loss_mask"].clone()
    mask[:, 0] = 0
    return batch | {"loss_mask": mask}


def loss_everywhere(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    return batch | {"loss_mask": torch.ones_like(batch["loss_mask"])}


def documents_joined(collate: Any, samples: Any) -> Any:
    batch = collate(samples)
    return batch | {"document_ids": torch.zeros_like(batch["document_ids"])}


def positions_run_on(position_ids: Any, self: Any, tokens: Any) -> Any:
    return np.arange(len(tokens), dtype=np.int64)


def seed_not_in_the_key(load_or_build: Any, self: Any, kind: str, key: dict[str, Any], build: Any) -> Any:
    return load_or_build(self, kind, {name: value for name, value in key.items() if name != "seed"}, build)


def samples_of_the_first(sample_order: Any, kind: Any, total: int, micro: int, dp: Axis, consumed: int = 0) -> Any:
    return sample_order(kind, total, micro, replace(dp, rank=0), consumed)


# Weights and schedule.


def another_seed(initial_weights: Any, config: Any, seed: int, dtype: Any, device: Any) -> Any:
    wrong = dict(initial_weights(config, seed + 1, dtype, device))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    for each, value in initial_weights(config, seed, dtype, device):
        yield each, wrong[name] if each == name else value


def one_step_late(rate: Any, self: Any, samples: int) -> float:
    return float(rate(self, samples)) * 0.9


def one_batch_ahead(rate: Any, self: Any, samples: int) -> float:
    return float(rate(self, samples + 4))


def a_replica_drifts(build: Any, config: Any, mesh: Any, *args: Any) -> Any:
    model, *rest = build(config, mesh, *args)
    if mesh.dp.rank == 1:
        with torch.no_grad():
            model.decoder.final_layernorm.weight[0] += 1e-6
    return (model, *rest)


# Forward.


def another_base(inverse_frequencies: Any, config: Any, device: Any) -> torch.Tensor:
    return inverse_frequencies(replace(config, rotary_base=500000.0), device)


def epsilon_in_the_kernel(forward: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    before, self.epsilon = self.epsilon, 1e-3
    try:
        return forward(self, x)
    finally:
        self.epsilon = before


def epsilon_of_the_module(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.epsilon = 1e-3


def low_softmax(core: Any, query: Any, key: Any, value: Any, hidden: Any, **settings: Any) -> torch.Tensor:
    scores = torch.bmm(query, key.transpose(1, 2)) / query.shape[-1] ** 0.5
    shares = torch.softmax(scores.masked_fill(hidden, -10000.0).bfloat16(), dim=-1).to(query.dtype)
    return torch.bmm(shares, value)


def low_products(linear: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """Multiply in fewer digits where the model is float32, as GPUs do when they may."""
    if x.dtype == torch.float32:
        x, weight = x + (x.bfloat16().float() - x).detach(), weight + (weight.bfloat16().float() - weight).detach()
    return linear(x, weight, bias)


def no_mask(hidden_positions: Any, where: torch.Tensor, length: int, documents: Any) -> torch.Tensor:
    hidden = hidden_positions(where, length, documents)
    return hidden & (torch.arange(length) != length - 1)


def all_seen(hidden_positions: Any, where: torch.Tensor, length: int, documents: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_positions(where, length, documents))


def query_and_key_swapped(core: Any, query: Any, key: Any, *rest: Any, **settings: Any) -> Any:
    return core(key, query, *rest, **settings)


def boundaries_not_seen(hidden_positions: Any, where: torch.Tensor, length: int, documents: Any) -> torch.Tensor:
    return hidden_positions(where, length, None if documents is None else torch.zeros_like(documents))


def not_scaled(scaled_frequencies: Any, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    return frequencies


def low_router(forward: Any, ctx: Any, *arguments: Any) -> torch.Tensor:
    logits: torch.Tensor = forward(ctx, *arguments)
    return logits.bfloat16().float() if logits.dtype == torch.float32 else logits


def without_the_last_expert(forward: Any, self: Any, tokens: Any, weights: Any, rows: Any) -> torch.Tensor:
    output = forward(self, tokens, weights, rows)
    return torch.cat([output[: rows.ends[-2]], torch.zeros_like(output[rows.ends[-2] :])])


@contextmanager
def streams_shared() -> Iterator[None]:
    with ExitStack() as stack:
        for module in (dropout, worker):  # the number that the function gives is told by name, too
            stack.enter_context(mock.patch.object(module, "stream_number", return_value=0))
        yield


def product_not_added(product: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, self.weight)


def one_process_is_off(product: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
    found = product(self, x)
    return found * 1.001 if self.mesh.tp.rank == 1 else found


# Loss and backward.


def every_token_counts_double(masked_sum: Any, *args: Any) -> Any:
    total, tokens = masked_sum(*args)
    return total, tokens * 2


def two_replicas_assumed(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self._dp = replace(self._dp, size=self._dp.size * 2)


def all_tokens_divide(divisors: Any, tokens: torch.Tensor, count: int) -> Any:
    return divisors(tokens.new_tensor(64.0), count)


def own_tokens_for_all(in_global_order: Any, found: torch.Tensor, dp: Axis) -> torch.Tensor:
    return found.repeat_interleave(dp.size, dim=0)


def double_weight(init: Any, self: Any, weight: float) -> None:
    init(self, weight * 2)


def scaled_in_backward(backward: Any, ctx: Any, *grads: Any) -> Any:
    first, *rest = backward(ctx, *grads)
    return (first * 1.01, *rest)


# Reduction, norm, clipping, update.


def overwritten(accumulate: Any, self: Any, param: Any) -> None:
    self._arrived[param] = 0
    accumulate(self, param)


def never(original: Any, *args: Any) -> bool:
    return False


def first_counted_twice(accumulate: Any, self: Any, param: Any) -> None:
    if not self._arrived[param]:
        param.grad = param.grad * 2
    accumulate(self, param)


def one_left_out(norms: Any, self: Any, tensors: Any) -> Any:
    return norms(self, [tensors[i] for i in range(len(tensors) - 1)])


def experts_left_out(total: Any, self: Any, sums: torch.Tensor) -> torch.Tensor:
    return total(self, torch.cat([sums[:2], torch.zeros_like(sums[2:])]))


def not_added(reduce: Any, self: Any, sharded: bool) -> None:
    self.started = True


def clipped_first(hand_over: Any, self: Any) -> Any:
    own = self.collect_grads()
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in own]))
    for grad in own:
        grad.mul_(0.1 / max(float(norm), 0.1))
    return hand_over(self)


def all_split(norm: Any, self: Any, tensors: Any) -> torch.Tensor:
    self._split = [True] * len(self._split)
    return norm(self, tensors)


def clipped_twice(multiply: Any, self: Any, factor: torch.Tensor) -> None:
    multiply(self, factor)
    multiply(self, factor)


def always(original: Any, *args: Any) -> bool:
    return True


def another_epsilon(build: Any, groups: Any, settings: Any) -> Any:
    return build(groups, replace(settings, adam_eps=1e-3))


@contextmanager
def epsilon_in_the_update() -> Iterator[None]:
    good = optimizer.AdamW

    def step(self: Any, closure: Any = None) -> Any:
        before = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            group["eps"] = 1e-3
        try:
            return good.step(self, closure)
        finally:
            for group, eps in zip(self.param_groups, before, strict=True):
                group["eps"] = eps

    kind = type("AdamW", (good,), {"step": step})
    with mock.patch.object(optimizer, "AdamW", kind):
        yield


def no_copy(copy_to_model: Any, self: Any) -> None:
    return None


# Resuming.


def nothing(original: Any, *arguments: Any) -> None:
    return None


def moments_zero(read: Any, self: Any, tensors: Any, config: Any) -> None:
    read(self, tensors, config)
    for name, placed in tensors.items():
        if name.startswith("optimizer.exp_avg"):
            placed.tensor.zero_()


def updates_forgotten(make: Any, optimizer: Any, placement: Any, saved: Any, step: Any) -> Any:
    return make(optimizer, placement, saved, 1)


def one_batch_less(restore: Any, source: Any, trainer: Any, evaluator: Any, progress: Any) -> None:
    restore(source, trainer, evaluator, progress)
    progress.consumed_samples -= 4
