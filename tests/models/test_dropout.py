"""Random streams and the dropout they drive."""

import pytest
import torch

from lockstep.models import DropoutStreams, build_model
from lockstep.models.dropout import STREAM_NAMES, bias_dropout_add, dropout, stream_seed

CPU = torch.device("cpu")


def test_masks_depend_on_nothing_but_seed_name_and_count():
    streams = DropoutStreams(11, CPU)
    first = streams.dropped("hidden", (3, 50), 0.4)
    again = DropoutStreams(11, CPU)
    torch.rand(7)
    again.dropped("attention", (1000,), 0.4)
    assert torch.equal(first, again.dropped("hidden", (3, 50), 0.4))
    assert not torch.equal(first, again.dropped("hidden", (3, 50), 0.4))
    assert not torch.equal(first, DropoutStreams(12, CPU).dropped("hidden", (3, 50), 0.4))


def test_every_stream_differs():
    streams = DropoutStreams(11, CPU)
    masks = [streams.dropped(name, (200,), 0.5) for name in STREAM_NAMES]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_stream_seeds_are_stable():
    assert [stream_seed(1234, name) for name in STREAM_NAMES] == [
        1605106094889816634,
        3183379227018808015,
        953424281138264497,
    ]


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_share_of_dropped_elements(probability):
    dropped = DropoutStreams(3, CPU).dropped("attention", (401, 499), probability)
    assert dropped.shape == (401, 499)
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.003)


def test_states_resume_exactly():
    streams = DropoutStreams(5, CPU)
    streams.dropped("hidden", (9,), 0.5)
    state = streams.state_dict()
    expected = [streams.dropped(name, (40,), 0.5) for name in STREAM_NAMES]
    resumed = DropoutStreams(99, CPU)
    resumed.load_state_dict(state)
    assert all(
        torch.equal(a, resumed.dropped(name, (40,), 0.5)) for name, a in zip(STREAM_NAMES, expected, strict=True)
    )
    with pytest.raises(ValueError, match="dropout streams"):
        resumed.load_state_dict({"hidden": state["hidden"]})


def test_dropout_scales_what_it_keeps():
    x = torch.ones(100, requires_grad=True)
    dropped = DropoutStreams(5, CPU).dropped("hidden", (100,), 0.2)
    y = dropout(x, dropped, 0.2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.detach(), torch.where(dropped, 0.0, 1.25))
    assert torch.equal(grad, y.detach())
    assert dropout(x, None, 0.2) is x


@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_dropout_add_is_rounded_once(has_bias):
    x, residual = torch.randn(3, 4, 8).bfloat16().requires_grad_(), torch.randn(3, 4, 8).bfloat16().requires_grad_()
    bias = torch.randn(8).bfloat16().requires_grad_() if has_bias else None
    dropped = torch.rand(3, 4, 8) < 0.5
    inputs = [part for part in (x, residual, bias) if part is not None]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    total = exact[0] + exact[2] if has_bias else exact[0]
    wanted = (total * 2).masked_fill(dropped, 0) + exact[1]
    result = bias_dropout_add(x, bias, residual, dropped, 0.5)
    assert torch.equal(result, wanted.to(torch.bfloat16))
    grad = torch.randn(3, 4, 8).bfloat16()
    ours = torch.autograd.grad(result, inputs, grad)
    for gradient, reference in zip(ours, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert torch.equal(gradient, reference.to(torch.bfloat16))


def test_a_training_model_uses_its_streams_and_an_evaluated_one_does_not(tiny):
    model = build_model(tiny(hidden_dropout=0.1, attention_dropout=0.1), seed=1, params_dtype=torch.float32, device=CPU)
    tokens, positions = torch.randint(0, 512, (2, 16)), torch.arange(16).expand(2, 16)

    def loss(seed: int) -> torch.Tensor:
        return model(tokens, positions, tokens, dropout=DropoutStreams(seed, CPU))

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    with pytest.raises(ValueError, match="needs random streams"):
        model(tokens, positions, tokens)
    model.eval()
    assert torch.equal(loss(1), model(tokens, positions, tokens))
