"""Products rounded from float32 against native low-precision ones and against float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.models import ops

CPU = torch.device("cpu")
LOW = [torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return input [2, 5, 48], weight [40, 48] and output gradient [2, 5, 40]."""
    x, weight, grad = torch.randn(2, 5, 48), torch.randn(40, 48), torch.randn(2, 5, 40)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def linear_and_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = ops.linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    return y.detach(), grad_x, grad_weight


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_linear_is_the_exact_result_rounded_once(dtype, use_mode):
    use_mode("fp32-rounded")
    x, weight, grad = operands(dtype)
    results = linear_and_gradients(x, weight, grad)
    exact = linear_and_gradients(x.double(), weight.double(), grad.double())
    for result, wanted in zip(results, exact, strict=True):
        assert result.dtype == dtype
        equal = result == wanted.to(dtype)
        # Values halfway between two representable ones may fall to either side of it.
        assert equal.float().mean() > 0.99
        torch.testing.assert_close(result.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_and_native_linear_agree(dtype, use_mode):
    results = {}
    for mode in ("native", "fp32-rounded"):
        use_mode(mode)
        torch.manual_seed(3)
        results[mode] = linear_and_gradients(*operands(dtype))
    for native, rounded in zip(results["native"], results["fp32-rounded"], strict=True):
        assert (native == rounded).float().mean() > 0.99
        torch.testing.assert_close(native, rounded, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_bias_is_added_after_rounding(use_mode):
    use_mode("fp32-rounded")
    x, weight, _ = operands(torch.bfloat16)
    bias = torch.randn(40).bfloat16()
    assert torch.equal(ops.linear(x, weight, bias), ops.linear(x, weight) + bias)


def test_mode_is_measured_for_low_precision_only():
    assert ops.matmul_mode(CPU, torch.float32) == "native"
    mode = ops.matmul_mode(CPU, torch.bfloat16)
    assert mode in ("native", "fp32-rounded")
    assert ops.matmul_mode(CPU, torch.bfloat16) == mode


@pytest.mark.parametrize(
    ("speedups", "mode"), [((0.002,), "fp32-rounded"), ((0.9, 0.8), "fp32-rounded"), ((0.9, 6.0), "native")]
)
def test_mode_follows_the_measured_speed(speedups, mode, monkeypatch):
    remaining = iter(speedups)
    monkeypatch.setattr(ops, "_native_speedup", lambda *_, **__: next(remaining))
    assert ops._measured_mode.__wrapped__("cpu", torch.bfloat16) == mode
    assert not list(remaining)


def test_embedding_gradient_adds_up_in_float32():
    weight = torch.randn(7, 4).bfloat16().requires_grad_()
    ids = torch.tensor([[2] * 600, [5] * 600])
    rows = ops.embedding(ids, weight)
    assert torch.equal(rows, F.embedding(ids, weight))
    (grad,) = torch.autograd.grad(rows, weight, torch.ones_like(rows))
    assert grad[2].tolist() == grad[5].tolist() == [600.0] * 4  # bfloat16 sums stop at 256
    assert not grad[[0, 1, 3, 4, 6]].any()


def test_a_given_gradient_is_where_a_backward_pass_begins():
    x, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (expected,) = torch.autograd.grad(x.exp(), x, grad)
    objective = ops.given_gradient(x.exp(), grad)
    assert objective.shape == ()
    (found,) = torch.autograd.grad(objective, x)
    assert torch.equal(found, expected)
