"""PyTorch's optimizers without its compiler update as they do with it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.training import update

ADAM = {"betas": (0.9, 0.95), "eps": 1e-6}
PAIRS = [
    pytest.param(update.AdamW, torch.optim.AdamW, ADAM, id="adamw"),
    pytest.param(update.SGD, torch.optim.SGD, {"momentum": 0.9}, id="sgd"),
    pytest.param(update.SGD, torch.optim.SGD, {"momentum": 0.0}, id="sgd-without-momentum"),
]


def _parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,), (2, 2), (1,))]


def _trained(kind: Any, settings: dict[str, Any], dtype: torch.dtype) -> tuple[list[nn.Parameter], Any]:
    """Return parameters in two groups after three steps, and their optimizer; the last parameter has no gradient."""
    params = _parameters(dtype)
    groups = [{"params": params[:2], "decayed": True}, {"params": params[2:], "decayed": False}]
    optimizer = kind(groups, lr=0.0, fused=True, **settings)
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for param in params[:-1]:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 / (1 + step), 0.3 if group["decayed"] else 0.0
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "settings"), PAIRS)
def test_updates_and_state_are_bit_for_bit_those_of_pytorch(ours, theirs, settings, dtype) -> None:
    params, optimizer = _trained(ours, settings, dtype)
    expected, reference = _trained(theirs, settings, dtype)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(params[:-1], _parameters(dtype)[:-1], strict=True))
    state, wanted = optimizer.state_dict(), reference.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    assert state["state"].keys() == wanted["state"].keys()
    for number, values in wanted["state"].items():
        assert state["state"][number].keys() == values.keys()
        for kind, value in values.items():
            found = state["state"][number][kind]
            if value is not None:
                torch.testing.assert_close(found, value, rtol=0.0, atol=0.0)
            else:
                assert found is None


@pytest.mark.parametrize(("ours", "theirs", "settings"), PAIRS)
def test_state_of_pytorch_is_taken_on(ours, theirs, settings) -> None:
    expected, reference = _trained(theirs, settings, torch.float32)
    params = [nn.Parameter(param.detach().clone()) for param in expected]
    optimizer = ours([{"params": params[:2]}, {"params": params[2:]}], lr=0.0, fused=True, **settings)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for group, stepping in ((expected, reference), (params, optimizer)):
        for param in group[:-1]:
            param.grad = torch.full_like(param, 0.25)
        stepping.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_what_looks_on_is_called_before_a_step() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = update.AdamW([param], lr=0.5, fused=True)
    seen: list[float] = []
    handle = optimizer.register_step_pre_hook(lambda stepped, *_: seen.append(float(stepped.param_groups[0]["lr"])))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [0.5]
