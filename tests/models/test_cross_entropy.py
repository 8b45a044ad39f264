"""The fused loss against the separate operations it stands for."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.models import ops
from lockstep.models.cross_entropy import _Tiles, linear_cross_entropy

TOKENS, VOCAB, HIDDEN = 50, 203, 24


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [5, 10, h], weight [v, h], labels [5, 10] and a gradient of the losses with zeros in it."""
    hidden, weight = torch.randn(5, 10, HIDDEN).to(dtype), torch.randn(VOCAB, HIDDEN).to(dtype)
    grad = torch.rand(5, 10) * (torch.rand(5, 10) > 0.2) / 37
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, VOCAB, (5, 10)), grad


def separate(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = ops.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def results(loss: Tensor, hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), grad)
    return loss.detach(), grad_hidden, grad_weight


@pytest.mark.parametrize("tile_numbers", [1 << 20, 1000, 64, 7])
def test_float32_is_that_of_separate_operations(tile_numbers):
    hidden, weight, labels, grad = problem(torch.float32)
    fused = results(linear_cross_entropy(hidden, weight, labels, tile_numbers=tile_numbers), hidden, weight, grad)
    for ours, wanted in zip(fused, results(separate(hidden, weight, labels), hidden, weight, grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", ["native", "fp32-rounded"])
@pytest.mark.parametrize("tile_numbers", [1 << 20, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_separate_rounded_operations(mode, tile_numbers, dtype, use_mode):
    use_mode(mode)
    hidden, weight, labels, grad = problem(dtype)
    fused = results(linear_cross_entropy(hidden, weight, labels, tile_numbers=tile_numbers), hidden, weight, grad)
    wanted = results(separate(hidden, weight, labels), hidden, weight, grad)
    torch.testing.assert_close(fused[0], wanted[0], rtol=1e-6, atol=1e-6)  # the same rounded logits
    for ours, theirs in zip(fused[1:], wanted[1:], strict=True):
        assert ours.dtype == dtype
        # The gradient of a logit next to a rounding boundary may differ by one step, nearly all are equal.
        assert (ours == theirs).float().mean() > 0.97
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_tokens_beyond_one_tile_of_rows(monkeypatch):
    monkeypatch.setattr("lockstep.models.cross_entropy._TILE_TOKENS", 16)
    test_float32_is_that_of_separate_operations(1000)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((1, 4), 100.0), torch.eye(6, 4) * 100
    loss = linear_cross_entropy(hidden, weight, torch.tensor([5]))
    assert loss.item() == pytest.approx(10000 + torch.tensor(4.0).log().item())


def test_logits_are_kept_for_a_backward_pass_only(use_mode, monkeypatch):
    use_mode("fp32-rounded")
    kept = []
    computed = _Tiles.computed

    def recorded(self: _Tiles, rows: slice, columns: slice, *, keep: bool) -> Tensor:
        kept.append(keep)
        return computed(self, rows, columns, keep=keep)

    monkeypatch.setattr(_Tiles, "computed", recorded)
    hidden, weight, labels, _ = problem(torch.bfloat16)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert kept == [False, True]
