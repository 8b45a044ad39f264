"""Loss averaging and gradient accumulation."""

import math

import pytest
import torch

from lockstep.models import build_model
from lockstep.models.router import RouterLosses
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.step import TrainStep


def _batch(masked: int = 0) -> Batch:
    """Return 4 samples of 6 tokens; the first ``masked`` tokens of the first two samples do not count."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, 11, (4, 7), generator=generator)
    mask = torch.ones(4, 6)
    mask[:2, :masked] = 0
    return Batch(text[:, :-1], text[:, 1:], mask, torch.arange(6).expand(4, 6))


def _run(configure, tiny_model, batch: Batch, micro: int, per_token: bool = False, changes=None):
    """Take a step that changes nothing; return its result and the gradients."""
    model = tiny_model()
    config = configure({"optimizer.optimizer": "sgd", "optimizer.clip_grad": 0.0, **(changes or {})})
    result = TrainStep(WholePasses(model), Optimizer(model, config), per_token=per_token)(batch, micro, 0.0, 0.0)
    return result, torch.cat([p.grad.flatten() for p in model.parameters()])


def _losses(tiny_model, batch: Batch) -> tuple[torch.nn.Module, torch.Tensor]:
    model = tiny_model()
    return model, model(batch.tokens, batch.position_ids, batch.labels)


def _grads(model: torch.nn.Module, objective: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(model.parameters()))])


def test_accumulation_equals_one_big_batch(configure, tiny_model) -> None:
    whole, grads = _run(configure, tiny_model, _batch(), 4)
    parts, accumulated = _run(configure, tiny_model, _batch(), 1)
    torch.testing.assert_close(accumulated, grads, rtol=1e-5, atol=1e-7)
    assert parts.lm_loss == pytest.approx(whole.lm_loss, rel=1e-6)
    assert parts.valid_tokens == whole.valid_tokens == 24


def test_uneven_masks_average_micro_batch_means(configure, tiny_model) -> None:
    batch = _batch(masked=5)
    result, grads = _run(configure, tiny_model, batch, 2)
    model, losses = _losses(tiny_model, batch)
    first, second = losses[:2, 5:], losses[2:]
    torch.testing.assert_close(grads, _grads(model, (first.mean() + second.mean()) / 2), rtol=1e-5, atol=1e-7)
    # What is reported is weighted by tokens, and so another number.
    assert result.valid_tokens == 14
    losses = losses.detach()
    first, second = losses[:2, 5:], losses[2:]
    expected = float((first.sum() + second.sum()) / 14)
    assert result.lm_loss == pytest.approx(expected, rel=1e-6)
    assert abs(result.lm_loss - float((first.mean() + second.mean()) / 2)) > 1e-3


def test_per_token_loss_divides_by_all_tokens(configure, tiny_model) -> None:
    batch = _batch(masked=5)
    _, grads = _run(configure, tiny_model, batch, 2, per_token=True)
    model, losses = _losses(tiny_model, batch)
    torch.testing.assert_close(grads, _grads(model, (losses * batch.loss_mask).sum() / 14), rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_tokens_counts_as_zero(configure, tiny_model) -> None:
    batch = _batch(masked=6)
    result, grads = _run(configure, tiny_model, batch, 2)
    model, losses = _losses(tiny_model, batch)
    torch.testing.assert_close(grads, _grads(model, losses[2:].mean() / 2), rtol=1e-5, atol=1e-7)
    assert result.valid_tokens == 12
    assert math.isfinite(result.lm_loss)


def test_loss_scale_leaves_gradients_and_loss(configure, tiny_model) -> None:
    scaled = {"mixed_precision.fp16": True, "mixed_precision.loss_scale": 256.0}
    plain, grads = _run(configure, tiny_model, _batch(), 2)
    result, unscaled = _run(configure, tiny_model, _batch(), 2, changes=scaled)
    torch.testing.assert_close(unscaled, grads, rtol=1e-5, atol=1e-7)
    assert (result.lm_loss, result.loss_scale) == (plain.lm_loss, 256.0)


def test_batches_split_in_order() -> None:
    batch = _batch()
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert all(part.document_ids is None for part in parts)


_EXPERTS = {
    "model.seq_length": 6,
    "model.vocab_size": 16,
    "model.num_moe_experts": 4,
    "model.moe_aux_loss_coeff": [0.5],
    "optimizer.optimizer": "sgd",
    "optimizer.clip_grad": 0.0,
}


def _router_grads(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [p.grad.flatten() for name, p in model.named_parameters() if "router" in name and p.grad is not None]
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_losses_of_routers_are_means_over_micro_batches(configure, per_token: bool) -> None:
    """Their gradient is what a step with them finds more than one without them."""
    batch, found = _batch(masked=3), []
    for coefficient in (0.5, 0.0):
        config = configure({**_EXPERTS, "model.moe_aux_loss_coeff": [coefficient]})
        model = build_model(config.model, seed=1, params_dtype=torch.float32, device=torch.device("cpu"))
        result = TrainStep(WholePasses(model), Optimizer(model, config), per_token=per_token)(batch, 2, 0.0, 0.0)
        found.append(_router_grads(model))
    assert result.router_losses == {}
    config = configure(_EXPERTS)
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=torch.device("cpu"))
    for part in batch.split(2):
        output = model(part.tokens, part.position_ids, part.labels, router_losses=RouterLosses(0.5))
        (output * 0.0).sum().backward()
    # With per-token loss everything is divided by the valid tokens, 18 of 24 here, as in Megatron-LM.
    wanted = _router_grads(model) * (24 / 18 if per_token else 1.0)
    torch.testing.assert_close(found[0] - found[1], wanted, rtol=1e-3, atol=1e-6)
