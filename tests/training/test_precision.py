"""Main weights, gradient sums and loss scaling."""

import pytest
import torch

from lockstep.training.precision import DynamicLossScaler, MainWeights, build_loss_scaler, params_dtype


@pytest.mark.parametrize(
    ("key", "dtype"), [("mixed_precision.bf16", torch.bfloat16), ("mixed_precision.fp16", torch.float16)]
)
def test_params_dtype(configure, key: str, dtype: torch.dtype) -> None:
    assert params_dtype(configure({key: True})) == dtype
    assert params_dtype(configure()) == torch.float32


def _backward(model, factor: float) -> torch.Tensor:
    """Take a backward pass; return the gradient of the embedding as autograd gives it, alone."""
    (model.embedding.sum() * factor).backward()
    return torch.full_like(model.embedding, factor)


def test_low_precision_gradients_are_summed_in_fp32(tiny_model) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    weights = MainWeights(model, torch.float32)
    for _ in range(2):  # the second round must not see the first
        weights.start_step()
        _backward(model, 1.0)
        _backward(model, 2.0**-12)
        assert model.embedding.grad is None
        grads = dict(zip(weights.names, weights.hand_over(), strict=True))
        assert grads["embedding"].dtype == torch.float32
        assert grads["embedding"].eq(1.0 + 2.0**-12).all()  # bfloat16 would have lost the second term
        assert grads["output.weight"].eq(0).all()


def test_low_precision_sums_when_asked_for(tiny_model) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    weights = MainWeights(model, torch.bfloat16)
    weights.start_step()
    _backward(model, 1.0)
    _backward(model, 2.0**-12)
    grads = dict(zip(weights.names, weights.hand_over(), strict=True))
    assert grads["embedding"].dtype == torch.bfloat16
    assert grads["embedding"].eq(1.0).all()


def test_updates_below_the_model_precision_are_kept(tiny_model) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    weights = MainWeights(model, torch.float32)
    before = model.embedding.detach().clone()
    for main in weights.main_params:
        main.data.mul_(1 + 2.0**-11)
    weights.copy_to_model()
    assert torch.equal(model.embedding, before)
    for main in weights.main_params:
        main.data.mul_(1 + 2.0**-7)
    weights.copy_to_model()
    assert not torch.equal(model.embedding, before)


def test_an_fp32_model_is_its_own_main_weights(tiny_model) -> None:
    model = tiny_model()
    weights = MainWeights(model, torch.float32)
    assert all(main is param for main, param in zip(weights.main_params, model.parameters(), strict=True))


def test_dynamic_scale_backs_off_after_its_hysteresis_and_grows_back() -> None:
    scaler = DynamicLossScaler(initial=16.0, minimum=2.0, window=3, hysteresis=2)
    scales = []
    for overflow in [True, True, True, False, False, False, True, True, True, True, True]:
        scaler.update(overflow)
        scales.append(scaler.scale)
    # One overflow is tolerated, then every one halves; three clean steps double and restore the tolerance.
    assert scales == [16, 8, 4, 4, 4, 8, 8, 4, 2, 2, 2]


def test_a_clean_run_is_broken_by_an_overflow() -> None:
    scaler = DynamicLossScaler(initial=16.0, minimum=1.0, window=2, hysteresis=2)
    for overflow in [False, True, False]:
        scaler.update(overflow)
    assert scaler.scale == 16.0
    scaler.update(False)
    assert scaler.scale == 32.0


def test_which_precision_scales(configure) -> None:
    assert build_loss_scaler(configure().mixed_precision) is None
    assert build_loss_scaler(configure({"mixed_precision.bf16": True}).mixed_precision) is None
    dynamic = build_loss_scaler(configure({"mixed_precision.fp16": True}).mixed_precision)
    assert dynamic is not None
    assert dynamic.scale == 2.0**32
    changes = {"mixed_precision.fp16": True, "mixed_precision.loss_scale": 128.0}
    static = build_loss_scaler(configure(changes).mixed_precision)
    assert static is not None
    static.update(True)
    assert static.scale == 128.0
