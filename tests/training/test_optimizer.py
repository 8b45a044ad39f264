"""Weight-decay groups, norms, clipping, and updates."""

import math

import pytest
import torch

from lockstep.parallel.gradients import l2_norm
from lockstep.training.optimizer import Optimizer, is_decayed


@pytest.mark.parametrize(
    ("name", "shape", "plain", "with_qk"),
    [
        ("embedding.word_embeddings.weight", (4, 2), True, True),
        ("decoder.layers.0.mlp.linear_fc1.weight", (4, 2), True, True),
        ("decoder.layers.0.mlp.linear_fc1.bias", (4,), False, False),
        ("decoder.layers.0.input_layernorm.weight", (4,), False, False),
        ("decoder.layers.0.self_attention.q_layernorm.weight", (4,), False, True),
        ("decoder.layers.0.self_attention.k_layernorm.bias", (4,), False, True),
        ("odd.bias", (4, 2), False, False),
    ],
)
def test_weight_decay_exclusion(name: str, shape: tuple[int, ...], plain: bool, with_qk: bool) -> None:
    assert is_decayed(name, torch.Size(shape), False) is plain
    assert is_decayed(name, torch.Size(shape), True) is with_qk


def test_norm_keeps_its_digits_over_many_elements() -> None:
    grads = [torch.full((20000, 256), 0.1), torch.full((7,), 3.0), torch.tensor(2.0)]
    exact = math.sqrt(20000 * 256 * float(torch.tensor(0.1)) ** 2 + 7 * 9 + 4)
    assert float(l2_norm(grads)) == pytest.approx(exact, rel=1e-6)


def _optimizer(configure, model, **changes):
    return Optimizer(model, configure({key.replace("__", "."): value for key, value in changes.items()}))


def _set_grads(model, value: float) -> None:
    for param in model.parameters():
        param.backward(torch.full_like(param, value))


def test_one_adam_step_by_hand(configure, tiny_model) -> None:
    model = tiny_model()
    torch.nn.init.ones_(model.output.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = _optimizer(configure, model, optimizer__clip_grad=0.0)
    optimizer.start_step()
    _set_grads(model, 0.5)
    update = optimizer.step(lr=0.1, weight_decay=0.2)
    assert not update.skipped
    for name, param in model.named_parameters():
        # The first bias-corrected Adam step is lr * g / (|g| + eps); decay shrinks matrices only.
        shrink = 1.0 if param.ndim == 1 else 1.0 - 0.1 * 0.2
        torch.testing.assert_close(param.detach(), before[name] * shrink - 0.1, rtol=1e-5, atol=1e-6)


def test_a_step_reaches_a_low_precision_model(configure, tiny_model) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = model.embedding.detach().clone()
    optimizer = _optimizer(configure, model, optimizer__clip_grad=0.0)
    optimizer.start_step()
    for param in model.parameters():
        param.backward(torch.ones_like(param))
    optimizer.step(lr=0.5, weight_decay=0.0)
    torch.testing.assert_close(model.embedding.detach(), (before.float() - 0.5).bfloat16())


def test_sgd_step_by_hand(configure, tiny_model) -> None:
    model = tiny_model()
    bias = model.output.bias.detach().clone()
    optimizer = _optimizer(configure, model, optimizer__optimizer="sgd", optimizer__clip_grad=0.0)
    for expected in (0.1 * 0.5, 0.1 * 0.5 * 1.9):
        optimizer.start_step()
        _set_grads(model, 0.5)
        optimizer.step(lr=0.1, weight_decay=0.0)
        bias -= expected
        torch.testing.assert_close(model.output.bias.detach(), bias)


@pytest.mark.parametrize(("value", "clipped"), [(10.0, True), (1e-3, False)])
def test_clipping_only_above_the_limit(configure, tiny_model, value: float, clipped: bool) -> None:
    model = tiny_model()
    optimizer = _optimizer(configure, model, optimizer__clip_grad=1.0, optimizer__optimizer="sgd")
    optimizer.start_step()
    _set_grads(model, value)
    count = sum(p.numel() for p in model.parameters())
    update = optimizer.step(lr=0.0, weight_decay=0.0)
    assert update.grad_norm is not None
    norm = float(update.grad_norm)
    assert norm == pytest.approx(value * math.sqrt(count), rel=1e-6)
    left = float(l2_norm([p.grad for p in model.parameters()]))
    assert left == pytest.approx(norm / (norm + 1e-6) if clipped else norm, rel=1e-6)


def test_zeros_are_counted_where_asked_for(configure, tiny_model) -> None:
    model = tiny_model()
    optimizer = _optimizer(configure, model, logger__log_num_zeros_in_grad=True)
    optimizer.start_step()
    for param in (model.embedding, model.output.weight):
        param.backward(torch.ones_like(param))
    model.output.bias.backward(torch.tensor([0.0, -0.0] + [1.0] * 9))
    assert optimizer.step(0.0, 0.0).num_zeros == 2


def test_overflow_skips_the_update_and_lowers_the_scale(configure, tiny_model) -> None:
    model = tiny_model(dtype=torch.float16)
    before = model.embedding.detach().clone()
    changes = {"mixed_precision__fp16": True, "mixed_precision__hysteresis": 1}
    optimizer = _optimizer(configure, model, **changes, mixed_precision__initial_loss_scale=1024.0)
    optimizer.start_step()
    _set_grads(model, 1.0)
    model.output.bias.backward(torch.tensor([0.0] * 3 + [math.inf] + [0.0] * 7, dtype=torch.float16))
    update = optimizer.step(lr=0.1, weight_decay=0.1)
    assert (update.skipped, update.grad_norm, update.num_zeros) == (True, None, None)
    assert torch.equal(model.embedding, before)
    assert optimizer.loss_scale == 512.0


def test_gradients_are_unscaled_before_the_norm(configure, tiny_model) -> None:
    model = tiny_model(dtype=torch.float16)
    changes = {"mixed_precision__fp16": True, "mixed_precision__loss_scale": 64.0}
    optimizer = _optimizer(configure, model, **changes)
    optimizer.start_step()
    _set_grads(model, 64.0)
    count = sum(p.numel() for p in model.parameters())
    norm = optimizer.step(lr=0.1, weight_decay=0.1).grad_norm
    assert norm is not None
    assert float(norm) == pytest.approx(math.sqrt(count), rel=1e-6)


def test_params_norm(configure, tiny_model) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    flat = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    assert float(_optimizer(configure, model).params_norm()) == pytest.approx(float(flat.norm()), rel=1e-6)


def test_low_gradients_are_widened_some_at_a_time(configure, tiny_model, monkeypatch) -> None:
    """Parts change neither weights nor norm, and no more wide gradients are there than a part has."""
    found = {}
    for elements in (1, 1 << 28):
        monkeypatch.setattr("lockstep.training.optimizer._WIDE_ELEMENTS", elements)
        config = configure({"mixed_precision.bf16": True, "ddp.grad_reduce_in_fp32": False, "optimizer.clip_grad": 0.1})
        model = tiny_model(dtype=torch.bfloat16)
        optimizer = Optimizer(model, config)
        counts: list[int] = []
        step = optimizer.inner.step

        def counted(step=step, optimizer=optimizer, counts=counts) -> None:
            counts.append(sum(p.grad is not None for p in optimizer.weights.main_params))
            step()

        monkeypatch.setattr(optimizer.inner, "step", counted)
        optimizer.start_step(1)
        generator = torch.Generator().manual_seed(1)
        for param in model.parameters():
            (param * torch.randn(param.shape, generator=generator).to(param.dtype)).sum().backward()
        update = optimizer.step(0.1, 0.1, torch.tensor(0.3))
        assert counts == ([1] * len(counts) if elements == 1 else [len(optimizer.weights.main_params)])
        assert all(p.grad is None for p in optimizer.weights.main_params)
        found[elements] = (float(update.grad_norm or 0), [p.detach().clone() for p in optimizer.weights.main_params])
    assert found[1][0] == found[1 << 28][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[1][1], found[1 << 28][1], strict=True))
