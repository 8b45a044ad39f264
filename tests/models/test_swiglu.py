"""SwiGLU's operation: its result and gradient, compilation, and where it is taken; on a GPU its kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.models import mlp, swiglu
from lockstep.models.mlp import Nonlinearity

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Kernels:
    """Stands in for the kernels, with the formulas that they compute."""

    @staticmethod
    def forward(inner: Tensor, result: Tensor) -> None:
        gate, up = inner.float().chunk(2, dim=-1)
        result.copy_(F.silu(gate) * up)

    @staticmethod
    def backward(inner: Tensor, grad: Tensor, result: Tensor) -> None:
        gate, up = inner.float().chunk(2, dim=-1)
        share = gate.sigmoid()
        of_gate = grad.float() * up * share * (1 + gate * (1 - share))
        result.copy_(torch.cat([of_gate, grad.float() * gate * share], dim=-1))


@pytest.fixture
def kernels(monkeypatch) -> None:
    """Have kernels that run on a CPU."""
    monkeypatch.setattr("lockstep.models.swiglu_kernels", Kernels, raising=False)


def plain(inner: Tensor) -> Tensor:
    """Return what the operation returns, by PyTorch's own operations."""
    gate, up = inner.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(inner.dtype)


def nonlinearity(**changes: Any) -> Nonlinearity:
    """Return the activation of a gated MLP with silu."""
    config = ModelConfig(gated_linear_unit=True, activation_func="silu", add_bias_linear=False)
    for name, value in changes.items():
        setattr(config, name, value)
    return Nonlinearity(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operation_is_that_of_separate_ones(kernels, dtype, compiled) -> None:
    inner = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    operation = swiglu.swiglu
    if compiled:
        operation = torch.compile(operation, backend="aot_eager", fullgraph=True, dynamic=False)
    found, wanted = operation(inner), plain(inner)
    grad = torch.linspace(-1, 1, found.numel()).view_as(found).to(dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    close: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(
        torch.autograd.grad(found, inner, grad)[0], torch.autograd.grad(wanted, inner, grad)[0], **close
    )


def test_views_are_taken_as_they_are(kernels) -> None:
    inner = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).t().requires_grad_()
    grad = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).t()
    found, wanted = swiglu.swiglu(inner), plain(inner)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, inner, grad)[0], torch.autograd.grad(wanted, inner, grad)[0])


@pytest.mark.parametrize(
    ("changes", "bias", "weights", "taken"),
    [
        ({}, False, False, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({"activation_func": "gelu"}, False, False, False),
        ({"gated_linear_unit": False}, False, False, False),
        ({"bias_activation_fusion": False}, False, False, False),
    ],
)
def test_where_it_is_taken(monkeypatch, changes, bias, weights, taken) -> None:
    monkeypatch.setattr(mlp, "has_kernel", lambda inner: True)
    calls: list[Tensor] = []

    def noted(inner: Tensor) -> Tensor:
        calls.append(inner)
        return plain(inner)

    monkeypatch.setattr(mlp, "swiglu", noted)
    inner = torch.randn(5, 16)
    activation = nonlinearity(**changes)
    activation(inner, torch.zeros(16) if bias else None, torch.ones(5) if weights else None)
    assert bool(calls) == taken


def test_float64_keeps_its_digits(monkeypatch) -> None:
    monkeypatch.setattr(swiglu, "runs_triton", lambda device: True)
    assert swiglu.has_kernel(torch.ones(2, 2))
    assert not swiglu.has_kernel(torch.ones(2, 2, dtype=torch.float64))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [8, 100, 1024, 8192])
def test_kernels_are_the_rounded_result(columns, dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(columns)
    inner = (3 * torch.randn(37, 2 * columns, device="cuda", generator=generator)).to(dtype).requires_grad_()
    grad = torch.randn(37, columns, device="cuda", generator=generator).to(dtype)
    exact = inner.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    found = swiglu.swiglu(inner)
    close: dict[str, Any] = {"rtol": 0.51 * torch.finfo(dtype).eps + 4e-6, "atol": 1e-6}
    torch.testing.assert_close(found.double(), wanted, **close)
    (ours,), (theirs,) = torch.autograd.grad(found, inner, grad), torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(ours.double(), theirs, **close)
